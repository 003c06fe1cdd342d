"""Functions with a gradient of their own, put back into a graph that was read without them: they cannot be read.

Stand-ins took their places (``engine/reading.py``), and differentiation made their gradients. Knows no framework.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import permutations

from qlab.core.graph import Graph, Node

MARK = 8  # axes by which the stand-in of a gated activation is known; no model has so many


def handwritten(graph: Graph) -> Graph:
    """Return a graph in which adapted products and gated activations have gradients of their own.

    - Two products that were added up, the gradients by what a layer read, become one that adds the smaller on its way
      (``engine/linear.adapted_product``).
    - The gradients of a gated activation read the gate twice, each time as an array of its own
      (``engine/activation.swiglu``).
    - Behind such a function stands what holds on to all that it was given.

    Args:
        graph: as it was read.
    """
    graph = replace(graph, arrays=dict(graph.arrays))
    graph.nodes = _adapted(graph, _gated(graph, graph.nodes))
    made = Graph()  # without the arrays that nobody makes any more
    made.inputs = [made.add(graph.arrays[a]) for a in graph.inputs]
    made.outputs = made.then(graph, made.inputs, {})
    return made


def _adapted(graph: Graph, nodes: Iterable[Node]) -> list[Node]:
    """Products that stand for an adapted layer's."""
    nodes = list(nodes)
    makers = {node.outputs[0]: node for node in nodes if node.name == "Matmul"}
    thin = {a: node.inputs[0] for a, node in makers.items()}
    readers = Counter(a for node in nodes for a in node.inputs) + Counter(graph.outputs)
    made: list[Node] = []
    merged: set[int] = set()
    for node in nodes:
        parts = [makers[a] for a in node.inputs if a in makers and readers[a] == 1] if node.name == "Add" else []
        # the smaller multiplies what was made thin of what the larger multiplies
        pairs = [pair for pair in permutations(parts, 2) if thin.get(pair[0].inputs[0]) == pair[1].inputs[0]]
        if pairs:
            small, large = pairs[0]
            merged.add(large.outputs[0])
            made.append(Node("AddMM", (*large.inputs, *small.outputs), node.outputs))
        elif node.name == "AddMM" and node.inputs[2] in makers:
            outer = makers[node.inputs[2]]
            given = node.inputs[0], makers[outer.inputs[0]].inputs[1], outer.inputs[1]
            made += _behind(graph, node, given)
        else:
            made.append(node)
    return [node for node in made if node.outputs[0] not in merged]


def _gated(graph: Graph, nodes: list[Node]) -> Iterator[Node]:
    """Products of marked arrays, which stand for a gated activation and its gradients."""
    marked = {a for a, array in graph.arrays.items() if len(array.shape) == MARK}
    plain = {node.outputs[0]: node.inputs[0] for node in nodes if node.outputs[0] in marked and len(node.inputs) == 1}
    after = {node.inputs[0]: node.outputs[0] for node in nodes if node.inputs and node.inputs[0] in marked}
    pairs: dict[int, tuple[int, int, bool]] = {}  # gate, what it is multiplied by, and which of both this is
    for node in nodes:
        if marked.isdisjoint((*node.inputs, *node.outputs)):
            yield node
        elif len(node.inputs) == 2:
            made, known = (after[node.outputs[0]],), [a for a in node.inputs if a in pairs]
            if not known:
                gate, x = (plain[a] for a in node.inputs)
                pairs |= {node.inputs[0]: (gate, x, True), node.inputs[1]: (gate, x, False)}
                yield from _behind(graph, Node("Multiply", (gate, x), made), (gate, x))
                continue
            gate, x, is_gate = pairs[known[0]]
            slope = plain[next(a for a in node.inputs if a != known[0])]
            own = graph.add(graph.arrays[gate])
            yield Node("Depends", (gate, slope, x) if is_gate else (gate, slope), (own,))
            yield Node("Multiply", (own, slope), made) if is_gate else Node("Select", (own, x, slope), made)


def _behind(graph: Graph, node: Node, given: tuple[int, ...]) -> list[Node]:
    """An operation, and what a function with a gradient of its own puts behind it."""
    whole, cut = (graph.add(graph.arrays[node.outputs[0]]) for _ in range(2))
    held = Node("CustomTransforms", (*given, cut), node.outputs)
    return [replace(node, outputs=(whole,)), Node("StopGradient", (whole,), (cut,)), held]
