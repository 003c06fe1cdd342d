"""Functions with a gradient of their own, put back into a graph that was read without them.

They cannot be read.

A stand-in took the place of each (``ops/custom_gradient.py``): every array that it reads is summed
to one number and spread over ``(number of the call, number of the array, 1, …)``, which is then
turned round; slopes on the way back are turned the other way. By these turns the stand-ins are
found, and what is read and made by them. Knows no framework.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from qlab.core.graph.graph import Graph, Node

AXES = 12  # by which a stand-in's arrays are known; no model has so many
FIRST = 2  # what numbers of calls and arrays are counted from: an axis of 1 would not tell


@dataclass(frozen=True)
class Halves:
    """Such a function.

    Attributes:
        forward: graph of the way forward, from given and closed arrays.
        backward: graph of its gradients by the given arrays, from a slope, and given and closed
            arrays.
        given: number of arrays with a gradient.
    """

    forward: Graph
    backward: Graph
    given: int


@dataclass
class _Found:
    """Ids of what a stand-in reads and makes; -1 for what nobody needed."""

    reads: dict[int, int] = field(default_factory=dict)
    makes: int = -1
    slope: int = -1
    gradients: dict[int, int] = field(default_factory=dict)


def handwritten(graph: Graph, calls: Sequence[Halves]) -> Graph:
    """Return a graph in which functions stand in the places of their stand-ins.

    Behind the way forward stands what MLX puts there: it holds on to all that it was given until a
    gradient is made.

    Args:
        graph: as it was read.
        calls: the functions, in the order in which they were called.
    """
    found = _Stands(graph, len(calls)).found
    ends = {each.makes: (n, True) for n, each in enumerate(found)}
    ends |= {a: (n, False) for n, each in enumerate(found) for a in each.gradients.values()}
    made = Graph()
    new = {}
    inputs = set(graph.inputs)
    for a, array in graph.arrays.items():
        if a in inputs or array.role == "constant":
            new[a] = made.add(array)
    for node in graph.nodes:
        if node.outputs[0] in new:
            continue
        if node.outputs[0] in ends:
            n, forward = ends[node.outputs[0]]
            call = calls[n]
            own = found[n]
            reads = [new[own.reads[i]] for i in sorted(own.reads)]
            if forward:
                (last,) = made.then(call.forward, reads, {})
                new[own.makes] = _behind(made, last, reads[: call.given])
            else:
                back = made.then(call.backward, [new[own.slope], *reads], {})
                new |= {a: back[i] for i, a in own.gradients.items()}
        elif not any(_is_marked(graph, a) for a in (*node.inputs, *node.outputs)):
            new |= {a: made.add(graph.arrays[a]) for a in node.outputs}
            made.nodes.append(node.renamed(new))
    made.inputs = [new[a] for a in graph.inputs]
    made.outputs = [new[a] for a in graph.outputs]
    return made.needed()


def _behind(graph: Graph, last: int, given: Sequence[int]) -> int:
    """Add what MLX puts behind such a function; return the id of its output."""
    cut = graph.add(graph.arrays[last])
    whole = graph.add(graph.arrays[last])
    graph.nodes += [
        Node("StopGradient", (last,), (cut,)),
        Node("CustomTransforms", (*given, cut), (whole,)),
    ]
    return whole


def _is_marked(graph: Graph, a: int) -> bool:
    return len(graph.arrays[a].shape) == AXES


class _Stands:
    """Finds the stand-ins."""

    def __init__(self, graph: Graph, calls: int) -> None:
        self.graph = graph
        self.makers = graph.makers()
        self.found = [_Found() for _ in range(calls)]
        self.readers: dict[int, list[int]] = {}
        turns = []
        for node in graph.nodes:
            for a in node.inputs:
                self.readers.setdefault(a, []).append(node.outputs[0])
            if node.name == "Transpose" and _is_marked(graph, node.inputs[0]):
                turns.append((graph.arrays[node.inputs[0]].shape, node.inputs[0], node.outputs[0]))
        self.forward = {after for shape, _, after in turns if shape[0] > 1}
        self.back = {before for shape, before, _ in turns if shape[0] == 1}
        for shape, before, after in turns:
            (source,) = set(self._sources(before))
            end = max(self._ends(after), default=-1)
            if shape[0] > 1:
                own = self.found[shape[0] - FIRST]
                own.reads[shape[1] - FIRST] = source
                own.makes = end
            else:
                own = self.found[shape[-1] - FIRST]
                own.slope = source
                own.gradients[shape[-2] - FIRST] = end

    def _sources(self, a: int) -> Iterator[int]:
        """Plain arrays that a marked one follows from, without numbers, and without what the way
        forward made.
        """
        if not _is_marked(self.graph, a):
            if self.graph.arrays[a].role != "constant":
                yield a
        elif a not in self.forward and a in self.makers:
            for x in self.graph.nodes[self.makers[a]].inputs:
                yield from self._sources(x)

    def _ends(self, a: int) -> Iterator[int]:
        """The plain array that follows from a marked one before any slope does, if it is needed."""
        if not _is_marked(self.graph, a):
            yield a
        elif a not in self.back:
            for x in self.readers.get(a, ()):
                yield from self._ends(x)
