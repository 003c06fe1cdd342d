"""Functions with custom gradients are put back into graphs that were read with stand-ins in their places."""

from __future__ import annotations

import mlx.core as mx
import pytest

from qlab.core.graph.handwritten import AXES
from qlab.ops.custom_gradient import with_gradient
from qlab.engine.memory.read_graph import read
from tests.core.graph.test_unmerge import names
from tests.tiny import on_mlx


def forward(x, y, w):
    return mx.exp(x @ w) * y


def backward(slope, x, y, w):
    return [mx.sin(slope * y) @ w.T, mx.cos(slope)]


def own(x, y, w):
    return with_gradient(forward, backward, [x, y], [w])


GIVEN = [mx.zeros((3, 4)), mx.zeros((3, 5)), mx.zeros((4, 5))]


@on_mlx
def test_both_halves_are_put_where_the_function_was():
    def run(x, y, w):
        value, slopes = mx.vjp(
            lambda x, y: [mx.log(own(mx.abs(x), y, w))], [x, y], [mx.ones((3, 5))]
        )
        return [*value, *slopes]

    found = read(run, GIVEN)
    assert names(found)[:6] == [
        "Abs",
        "Matmul",
        "Exp",
        "Multiply",
        "StopGradient",
        "CustomTransforms",
    ]
    assert {"Log", "Sin", "Cos", "Sign"} <= set(names(found))
    held = found.nodes[5]
    assert held.inputs == (found.nodes[0].outputs[0], found.inputs[1], found.nodes[4].outputs[0])
    assert [found.arrays[a].shape for a in found.outputs] == [(3, 5), (3, 4), (3, 5)]
    assert all(len(array.shape) < AXES for array in found.arrays.values())
    assert len(found.arrays) == sum(len(n.outputs) for n in found.nodes) + len(
        [a for a, array in found.arrays.items() if a in found.inputs or array.role == "constant"]
    )  # none without an operation that makes it


@on_mlx
def test_what_is_not_needed_is_left_out_in_both_passes():
    def run(x, y, w):
        return mx.vjp(lambda x, y: [own(x, y, w)], [x, y], [mx.ones((3, 5))])[1][1:]

    assert not {"Exp", "CustomTransforms", "Sin", "Matmul"} & set(names(read(run, GIVEN)))
    assert "Cos" in names(read(run, GIVEN))


@on_mlx
def test_what_it_reads_in_the_backward_pass_is_computed_even_if_nothing_else_asks_for_it():
    def run(x, y, w):
        return mx.vjp(lambda x: [own(x, mx.tanh(y), mx.square(w))], [x], [mx.ones((3, 5))])[1]

    found = names(read(run, GIVEN))
    assert {"Tanh", "Square", "Sin"} <= set(found) and "Exp" not in found


@on_mlx
def test_several_calls_are_told_apart_also_one_within_another():
    def outer(x, y, w):
        return with_gradient(
            lambda *a: mx.sqrt(own(*a)),
            lambda slope, *a: [mx.square(slope) @ a[2].T, slope],
            [x, y],
            [w],
        )

    def run(x, y, w):
        return mx.vjp(
            lambda x, y: [own(x, own(x, y, w), w), outer(x, y, w)], [x, y], [mx.ones((3, 5))] * 2
        )[1]

    found = names(read(run, GIVEN))
    assert (found.count("Sin"), found.count("Cos"), found.count("Square")) == (2, 2, 1)
    value = names(read(lambda *a: [own(a[0], own(*a), a[2]), outer(*a)], GIVEN))
    assert (value.count("Exp"), value.count("CustomTransforms"), value.count("Sqrt")) == (3, 4, 1)


@pytest.mark.parametrize("dtype", [mx.float16, mx.float32], ids=str)
@on_mlx
def test_sizes_and_numbers_are_those_of_the_real_function(dtype):
    given = [
        a.astype(dtype)
        for a in (mx.random.normal((3, 4)), mx.random.normal((1, 5)), mx.random.normal((4, 5)))
    ]

    def run(x, y, w):
        return [own(x, y, w), *mx.vjp(lambda x: [own(x, y, w)], [x], [mx.ones((3, 5), dtype)])[1]]

    found, real = read(run, given), run(*given)
    assert [(found.arrays[a].shape, found.arrays[a].itemsize) for a in found.outputs] == [
        (a.shape, a.dtype.size) for a in real
    ]
    assert mx.array_equal(real[1], backward(mx.ones((3, 5), dtype), *given)[0])
