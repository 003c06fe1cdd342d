"""Graphs are read as MLX would run them, without running them: this is what is relied on of ``mx.export_function``."""

from __future__ import annotations

import qlab  # noqa
from qlab.nn import low_rank

import mlx.core as mx
import pytest

from qlab.engine.memory.read_graph import read
from qlab.errors import UnsupportedError
from tests.tiny import on_mlx


@on_mlx
def test_operations_shapes_and_roles_are_read_in_order():
    x, w = mx.zeros((3, 4)), mx.zeros((5, 4), mx.bfloat16)
    made = read(lambda a, b: [mx.exp(a @ b.T.astype(mx.float32)), a], [x, w], ["batch", "weights"])
    assert [node.name for node in made.nodes] == ["Transpose", "AsType", "Matmul", "Exp"]
    assert made.nodes[0].arguments[0] == [1, 0] or tuple(made.nodes[0].arguments[0]) == (1, 0)
    assert [made.arrays[a].role for a in made.inputs] == ["batch", "weights"]
    assert [made.arrays[a].nbytes for a in made.outputs] == [60, 48] and made.outputs[
        1
    ] == made.inputs[0]


@on_mlx
def test_nothing_is_computed():
    mx.clear_cache()
    mx.reset_peak_memory()
    huge = mx.zeros((100_000, 100_000))
    made = read(lambda a: [(a @ a).sum()], [huge])
    assert mx.get_peak_memory() < mx.get_active_memory() + 1e6
    assert made.arrays[made.nodes[0].outputs[0]].nbytes == 4e10


@on_mlx
def test_what_cannot_be_read_is_said():
    with pytest.raises(UnsupportedError, match="cannot be read"):
        read(lambda x: [mx.checkpoint(mx.exp)(x)], [mx.zeros(3)])


@on_mlx
def test_an_error_of_the_function_itself_is_passed_on():
    with pytest.raises(ValueError, match="matmul"):
        read(lambda x: [x @ x], [mx.zeros((2, 3))])


@on_mlx
def test_fused_attention_that_cannot_be_read_is_stood_in_for(monkeypatch):
    fused = mx.fast.scaled_dot_product_attention

    def refuse(q, *_, **__):
        raise ValueError(
            "[export_function] Unable to get state for primitive ScaledDotProductAttentionVJP"
        )

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", refuse)
    q, k = mx.zeros((2, 4, 64, 8)), mx.zeros((2, 2, 64, 8))

    def backward(q, k, v):
        return mx.grad(
            lambda *a: mx.fast.scaled_dot_product_attention(*a, scale=1.0, mask="causal").sum(),
            [0, 1, 2],
        )(q, k, v)

    made = read(lambda *a: list(backward(*a)), [q, k, k])
    assert [made.arrays[a].shape for a in made.outputs] == [q.shape, k.shape, k.shape]
    assert max(array.size for array in made.arrays.values()) <= q.size  # none of the length squared
    assert mx.fast.scaled_dot_product_attention is refuse and fused is not refuse


@pytest.mark.parametrize("sorted_indices", [True, False])
@on_mlx
def test_the_gradient_by_the_factors_of_experts_is_stood_in_for(sorted_indices):
    x, weights, indices = mx.zeros((96, 1, 8)), mx.zeros((4, 5, 8)), mx.zeros(96, mx.int32)
    real = low_rank.routed

    def backward(x, weights):
        return mx.grad(lambda *a: low_rank.routed(*a, indices, sorted_indices).sum(), [0, 1])(
            x, weights
        )

    made = read(lambda *a: list(backward(*a)), [x, weights])
    assert [made.arrays[a].shape for a in made.outputs] == [x.shape, weights.shape]
    if sorted_indices:
        assert (
            max(array.size for array in made.arrays.values()) <= x.size
        )  # no gradient for every row
    assert low_rank.routed is real
