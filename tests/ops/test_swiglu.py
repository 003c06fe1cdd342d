"""A gated activation that is computed again on the way back: the same numbers from fewer arrays."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest

from qlab.ops.swiglu import swiglu
from tests.tiny import on_mlx


def given(dtype: mx.Dtype = mx.float32) -> list[mx.array]:
    return [(3 * mx.random.normal((4, 7), key=mx.random.key(n))).astype(dtype) for n in range(3)]


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@on_mlx
def test_value_and_gradients_are_those_of_mlx_lms(dtype, compiled):
    def both(function):
        def run(gate, x, cotangent):
            (y,), slopes = mx.vjp(function, [gate, x], [cotangent])
            return [y, *slopes]

        return mx.compile(run) if compiled else run

    exact = both(lambda gate, x: nn.silu(gate) * x)(*(a.astype(mx.float32) for a in given(dtype)))
    tolerance = {mx.float32: 1e-5, mx.bfloat16: 3e-2, mx.float16: 3e-3}[dtype]
    for found, wanted in zip(both(swiglu)(*given(dtype)), exact, strict=True):
        assert found.dtype == dtype
        assert (
            mx.abs(found.astype(mx.float32) - wanted).max().item()
            < tolerance * mx.abs(wanted).max().item()
        )


@pytest.mark.parametrize("dtypes", [(mx.bfloat16, mx.float32), (mx.float32, mx.bfloat16)], ids=str)
@on_mlx
def test_each_gradient_has_the_dtype_of_what_it_belongs_to(dtypes):
    gate, x, _ = (
        array.astype(dtype) for array, dtype in zip(given(), (*dtypes, mx.float32), strict=True)
    )
    (y,), slopes = mx.vjp(swiglu, [gate, x], [given()[2]])
    assert (y.dtype, *(slope.dtype for slope in slopes)) == (mx.float32, *dtypes)
