"""Elementwise operations become one as MLX's compiler makes them one, and nothing else changes."""

from __future__ import annotations

from qlab.core.graph.fusion import fused
from qlab.core.graph.graph import Node
from tests.core.graph.test_graph import graph


def names(found) -> list[str]:
    return [node.name for node in found.nodes]


def test_a_chain_becomes_one_operation():
    found = fused(
        graph(
            [8] * 4,
            [Node("Exp", (0,), (1,)), Node("Multiply", (1, 0), (2,)), Node("Abs", (2,), (3,))],
            [3],
        )
    )
    assert names(found) == ["Compiled"]
    assert found.nodes[0].inputs == (0,) and found.nodes[0].outputs == (3,)


def test_a_lone_operation_stays():
    nodes = [Node("Exp", (0,), (1,)), Node("Matmul", (1, 1), (2,)), Node("Abs", (2,), (3,))]
    assert names(fused(graph([8] * 4, nodes, [3]))) == ["Exp", "Matmul", "Abs"]


def test_what_is_read_elsewhere_is_not_swallowed():
    nodes = [
        Node("Exp", (0,), (1,)),
        Node("Abs", (1,), (2,)),
        Node("Sin", (2,), (3,)),
        Node("Matmul", (1, 1), (4,)),
    ]
    found = fused(graph([8] * 5, nodes, [3, 4]))
    assert names(found) == ["Exp", "Compiled", "Matmul"] and found.nodes[1].inputs == (1,)


def test_an_output_within_a_chain_is_an_output_of_the_whole():
    found = fused(graph([8] * 3, [Node("Exp", (0,), (1,)), Node("Abs", (1,), (2,))], [1, 2]))
    assert names(found) == ["Compiled"] and set(found.nodes[0].outputs) == {1, 2}


def test_each_reader_gets_a_broadcast_of_its_own():
    nodes = [
        Node("Broadcast", (0,), (1,)),
        Node("Add", (1, 2), (3,)),
        Node("Abs", (3,), (4,)),
        Node("Matmul", (1, 4), (5,)),
    ]
    found = fused(graph([1, 8, 8, 8, 8, 8], nodes, [5]))
    assert sorted(names(found)) == ["Broadcast", "Compiled", "Matmul"]
    assert set(next(node for node in found.nodes if node.name == "Compiled").inputs) == {0, 2}


def test_a_chain_is_cut_where_the_compiler_cuts_it():
    nodes = [Node("Exp", (i,), (i + 1,)) for i in range(15)]
    assert names(fused(graph([8] * 16, nodes, [15]))) == ["Compiled", "Compiled"]
