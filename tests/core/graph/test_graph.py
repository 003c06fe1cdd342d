"""Graphs are put together without mixing their arrays up."""

from __future__ import annotations

from qlab.core.graph.graph import Array
from qlab.core.graph.graph import Graph
from qlab.core.graph.graph import Node


def graph(
    sizes: list[int], nodes: list[Node], outputs: list[int], roles: dict[int, str] | None = None
) -> Graph:
    """A graph of float32 vectors; those that no node makes are its inputs, unless they are constants."""
    roles = roles or {}
    arrays = {a: Array((size,), 4, roles.get(a, "")) for a, size in enumerate(sizes)}
    made = {a for node in nodes for a in node.outputs}
    inputs = [a for a in arrays if a not in made and roles.get(a) != "constant"]
    return Graph(arrays=arrays, nodes=nodes, inputs=inputs, outputs=outputs)


def test_a_piece_goes_on_from_what_it_is_given():
    whole = Graph()
    x = whole.add(Array((8,), 4, "batch"))
    piece = graph([8, 8], [Node("Exp", (0,), (1,))], [1])
    (y,) = whole.then(piece, [x], {})
    (z,) = whole.then(piece, [y], {})
    assert [node.inputs for node in whole.nodes] == [(x,), (y,)] and whole.nodes[1].outputs == (z,)
    assert whole.arrays[z].shape == (8,) and whole.arrays[z].role == ""


def test_constants_of_a_piece_are_shared_by_its_copies():
    whole, constants = Graph(), {}
    x = whole.add(Array((8,), 4, "batch"))
    piece = graph([8, 1, 8], [Node("Add", (0, 1), (2,))], [2], {1: "constant"})
    for _ in range(2):
        whole.then(piece, [x], constants)
    assert whole.nodes[0].inputs == whole.nodes[1].inputs
    assert sum(array.role == "constant" for array in whole.arrays.values()) == 1
