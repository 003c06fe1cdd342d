"""An array shares a buffer where MLX lets it, and gets one of its own everywhere else."""

from __future__ import annotations

import pytest

from qlab.core.graph.buffers import Buffers, Change
from qlab.core.graph.graph import Array, Graph, Node


def run(shapes: list[tuple[int, ...]], node: Node, readers: dict[int, int]):
    """Evaluate one operation of float32 arrays; inputs are those that it does not make."""
    graph = Graph(arrays={a: Array(shape, 4) for a, shape in enumerate(shapes)}, nodes=[node])
    changes: list[tuple[int, Change]] = []
    record = lambda buffer, change: changes.append((buffer.array, change))  # noqa: E731
    buffers = Buffers(graph, dict(readers), False, record)
    for a in graph.arrays:
        if a not in node.outputs:
            buffers.allocate(a)
    temporary = buffers.evaluate(node)
    return buffers, temporary, changes


@pytest.mark.parametrize(("readers", "is_new"), [(1, False), (2, True)])
def test_the_last_reader_writes_over_what_it_reads(readers, is_new):
    buffers, *_ = run([(9, 9)] * 2, Node("Exp", (0,), (1,)), {0: readers})
    assert buffers.is_new(1) == is_new


def test_an_array_of_another_size_is_not_written_over():
    shapes = [(100, 100), (1, 100), (100, 100)]
    buffers, *_ = run(shapes, Node("Add", (1, 0), (2,)), {0: 2, 1: 1})
    assert buffers.is_new(2)


def test_a_function_of_numbers_is_a_number():
    buffers, *_ = run([(1, 1), (1, 1)], Node("Exp", (0,), (1,)), {0: 2})
    assert buffers[1].nbytes == 4


@pytest.mark.parametrize("name", ["ExpandDims", "StopGradient", "Slice"])
def test_a_view_is_in_the_buffer_of_its_source(name):
    buffers, _, changes = run([(4, 9), (4, 9)], Node(name, (0,), (1,)), {0: 1})
    assert buffers[1] is buffers[0] and buffers[0].arrays == 2
    assert changes == [(0, Change.TAKEN)]


def test_a_buffer_is_free_when_the_last_array_in_it_goes():
    buffers, _, changes = run([(4, 9), (4, 9)], Node("StopGradient", (0,), (1,)), {0: 1})
    buffers.read(0)
    assert changes == [(0, Change.TAKEN)]
    buffers.drop(1)
    assert changes[-1] == (0, Change.FREED)


def test_a_buffer_that_an_unfinished_operation_reads_is_idle():
    buffers, _, changes = run([(4, 9), (4, 9)], Node("Matmul", (0, 0), (1,)), {0: 2})
    buffers[1].flights += 1
    buffers.drop(1)
    assert changes[-1] == (1, Change.IDLE)


def test_operands_of_a_product_are_copied_unless_rows_or_columns_are_dense():
    *_, changes = run([(4, 9), (9, 5), (4, 5)], Node("Matmul", (0, 1), (2,)), {0: 1, 1: 1})
    assert len(changes) == 3
