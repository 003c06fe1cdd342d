"""Codes by a table of sixteen values: MLX's operations, and a kernel that is used only where its numbers are the same."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from qlab.core import lookup
from qlab.core.lookup import Lookup
from tests.tiny import on_mlx

TABLE = np.linspace(-1, 1, 16, dtype=np.float32)


def kernel(wrong: float = 1.0):
    """What a GPU's kernel does, by numpy, from what it is given."""

    def run(*, inputs, template, grid, threadgroup, output_shapes, output_dtypes):
        codes, scales, table = (np.array(x) for x in inputs)
        given = dict(template)
        assert grid[0] == codes.size and grid[0] % threadgroup[0] == 0 and given["T"] == output_dtypes[0]
        each = (codes.reshape(-1, 1) >> np.arange(0, 32, 4, dtype=np.uint32)) & 15
        scale = scales.reshape(-1)[np.arange(codes.size) // given["WORDS"]]
        made = mx.array((table[each] * scale[:, None] * np.float32(wrong)).reshape(output_shapes[0]))
        return [made.astype(output_dtypes[0])]

    return run


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@on_mlx
def test_both_ways_give_the_same_numbers(group_size, dtype, monkeypatch):
    codes = mx.random.randint(0, 2**31 - 1, (6, 32)).astype(mx.uint32)
    scales = mx.random.uniform(0.1, 2, (6, 256 // group_size))
    plain = Lookup(TABLE).weights(codes, scales, group_size, dtype)
    assert plain.shape == (6, 256) and plain.dtype == dtype
    monkeypatch.setattr(lookup, "_kernel", kernel)
    assert mx.array_equal(Lookup(TABLE).weights(codes, scales, group_size, dtype), plain)


@on_mlx
def test_a_kernel_is_used_only_if_its_numbers_are_right():
    def broken(**_):
        raise RuntimeError("no compiler here")

    assert Lookup(TABLE).agrees(kernel())
    assert not Lookup(TABLE).agrees(kernel(wrong=1.001))
    assert not Lookup(TABLE).agrees(broken)
    assert lookup._kernel() is None or mx.default_device() != mx.cpu


@on_mlx
def test_the_kernel_for_metal_is_one_function_of_its_three_inputs(monkeypatch):
    """There is no such device here: what MLX makes of the source is looked at instead."""
    made = []
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(Lookup, "agrees", lambda self, kernel: True)
    fused = lookup._kernel.__wrapped__()
    monkeypatch.undo()
    monkeypatch.setattr(lookup, "_kernel", lambda: fused)
    run = lambda codes, scales: Lookup(TABLE).weights(codes, scales, 64, mx.bfloat16)  # noqa: E731
    mx.export_function(made.append, run, mx.zeros((4, 32), mx.uint32), mx.zeros((4, 4)))
    found = next(x for x in made if x.get("name") == "CustomKernel")
    assert found["outputs"][0][1:] == ((4, 256), mx.bfloat16)
    source = found["arguments"][1]
    for part in (
        "const device uint32_t* codes",
        "const device float* scales",
        "device bfloat16_t* out",
        "thread_position_in_grid",
    ):
        assert part in source, source
