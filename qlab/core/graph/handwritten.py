"""Puts functions with custom gradients back into a graph that was read without them.

``mx.custom_function`` cannot be exported. While a graph is read, a *stand-in* of ordinary
operations takes the place of each call (``ops/custom_gradient.py``), and ``read_graph`` reads both
halves of the function, forward and backward, as graphs of their own. Here the stand-ins are found
and the halves put in their places. Knows no framework.

How a stand-in is found. Every array that the function reads is summed to one number, which is
spread over ``(call, array, 1, …)``, 12 axes: as long on the first as the number of the call, on the
second as the number of the array. It is then turned round, to ``(1, …, array, call)``, and the
stand-in's output is made of the sum of all. The gradient of turning round is turning round; so
in the backward pass a slope passes a turn from ``(1, …, array, call)`` to ``(call, array, 1,
…)``. No model has arrays of 12 axes, so each such turn names a call and an array, and its direction
tells forward from backward:

    array → sum → (call, array, 1, …) → turn → (1, …, array, call) → … → output      forward
    gradient ← … ← (call, array, 1, …) ← turn ← (1, …, array, call) ← … ← slope      backward
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from qlab.core.graph.graph import Graph, Node

AXES = 12  # of a stand-in's arrays; no model has so many
FIRST = 2  # what calls and arrays are numbered from: an axis of length 1 would not tell


@dataclass(frozen=True)
class Halves:
    """A function with a custom gradient, read.

    Attributes:
        forward: graph from its differentiable and its other arrays to its output.
        backward: graph from a slope and the same arrays to the gradients by the differentiable
            ones.
        differentiable: number of arrays that have a gradient; they come first.
    """

    forward: Graph
    backward: Graph
    differentiable: int


@dataclass
class _StandIn:
    """Ids of what a stand-in reads and makes; −1 for what nothing needed.

    Attributes:
        reads: arrays that the function is given, by their number.
        output: array that it returns.
        slope: gradient by that array.
        gradients: by the arrays that it is given, by their number.
    """

    reads: dict[int, int] = field(default_factory=dict)
    output: int = -1
    slope: int = -1
    gradients: dict[int, int] = field(default_factory=dict)


def handwritten(graph: Graph, calls: Sequence[Halves]) -> Graph:
    """Return a graph in which functions stand in the places of their stand-ins.

    Behind the forward half stands what MLX puts there: it holds all arrays that the function was
    given until a gradient is made.

    Args:
        graph: as it was read.
        calls: the functions, in the order in which they were called.
    """
    return _Rebuilding(graph, calls).run()


class _Rebuilding:
    """Copies a graph node by node, with halves in the places of stand-ins."""

    def __init__(self, graph: Graph, calls: Sequence[Halves]) -> None:
        self._graph = graph
        self._calls = calls
        self._stand_ins = _Search(graph, len(calls)).stand_ins
        self._copy = Graph()
        self._new: dict[int, int] = {}  # ids in the copy, by ids in the graph
        # calls by the arrays that end their forward and backward passes
        self._outputs: dict[int, int] = {}
        self._gradients: dict[int, int] = {}
        for n, stand_in in enumerate(self._stand_ins):
            self._outputs[stand_in.output] = n
            for gradient in stand_in.gradients.values():
                self._gradients[gradient] = n

    def run(self) -> Graph:
        inputs = set(self._graph.inputs)
        for a, array in self._graph.arrays.items():
            if a in inputs or array.role == "constant":
                self._new[a] = self._copy.add(array)
        for node in self._graph.nodes:
            self._node(node)
        self._copy.inputs = [self._new[a] for a in self._graph.inputs]
        self._copy.outputs = [self._new[a] for a in self._graph.outputs]
        return self._copy.needed()

    def _node(self, node: Node) -> None:
        output = node.outputs[0]
        if output in self._new:  # the first of several gradients has brought the others with it
            return
        if output in self._gradients:
            self._backward(self._gradients[output])
        elif output in self._outputs:
            self._forward(self._outputs[output])
        elif not self._touches_marked(node):
            self._ordinary(node)

    def _touches_marked(self, node: Node) -> bool:
        sides = (*node.inputs, *node.outputs)
        return any(_is_marked(self._graph, a) for a in sides)

    def _ordinary(self, node: Node) -> None:
        for a in node.outputs:
            array = self._graph.arrays[a]
            self._new[a] = self._copy.add(array)
        renamed = node.renamed(self._new)
        self._copy.nodes.append(renamed)

    def _forward(self, n: int) -> None:
        call = self._calls[n]
        reads = self._reads(n)
        (last,) = self._copy.then(call.forward, reads, {})
        differentiable = reads[: call.differentiable]
        output = self._stand_ins[n].output
        self._new[output] = self._held(last, differentiable)

    def _backward(self, n: int) -> None:
        stand_in = self._stand_ins[n]
        slope = self._new[stand_in.slope]
        inputs = [slope, *self._reads(n)]
        backward = self._calls[n].backward
        gradients = self._copy.then(backward, inputs, {})
        for number, a in stand_in.gradients.items():
            self._new[a] = gradients[number]

    def _reads(self, n: int) -> list[int]:
        reads = self._stand_ins[n].reads
        in_order = [reads[number] for number in sorted(reads)]
        return [self._new[a] for a in in_order]

    def _held(self, last: int, reads: Sequence[int]) -> int:
        """Add what MLX puts behind such a function; return the id of its output.

        ``custom_function`` of ``mlx/transforms.cpp``: a ``CustomTransforms`` of all inputs and of
        the outputs, whose gradients are stopped.
        """
        array = self._copy.arrays[last]
        stopped = self._copy.add(array)
        output = self._copy.add(array)
        stop = Node("StopGradient", (last,), (stopped,))
        self._copy.nodes.append(stop)
        inputs = (*reads, stopped)
        transforms = Node("CustomTransforms", inputs, (output,))
        self._copy.nodes.append(transforms)
        return output


def _is_marked(graph: Graph, a: int) -> bool:
    shape = graph.arrays[a].shape
    return len(shape) == AXES


class _Turn(NamedTuple):
    """A transpose of an array that names a call and one of its arrays.

    Attributes:
        shape: before the turn: ``(call, array, 1, …)`` forward, ``(1, …, array, call)`` backward.
        before: id of the array that is turned.
        after: id of the turned one.
    """

    shape: tuple[int, ...]
    before: int
    after: int

    @property
    def is_forward(self) -> bool:
        return self.shape[0] > 1


class _Search:
    """Finds the stand-ins by their turns."""

    def __init__(self, graph: Graph, calls: int) -> None:
        self._graph = graph
        self._makers = graph.makers()
        self._readers: dict[int, list[int]] = {}  # first outputs of an array's readers
        turns = []
        for node in graph.nodes:
            output = node.outputs[0]
            for a in node.inputs:
                readers = self._readers.setdefault(a, [])
                readers.append(output)
            if node.name != "Transpose":
                continue
            before = node.inputs[0]
            if _is_marked(graph, before):
                shape = graph.arrays[before].shape
                turns.append(_Turn(shape, before, output))
        self._turned_forward = {turn.after for turn in turns if turn.is_forward}
        self._turned_back = {turn.before for turn in turns if not turn.is_forward}
        self.stand_ins = [_StandIn() for _ in range(calls)]
        for turn in turns:
            self._note(turn)

    def _note(self, turn: _Turn) -> None:
        sources = set(self._sources(turn.before))
        (source,) = sources
        ends = self._ends(turn.after)
        end = max(ends, default=-1)
        if turn.is_forward:
            call, number, *_ = turn.shape
            stand_in = self.stand_ins[call - FIRST]
            stand_in.reads[number - FIRST] = source
            stand_in.output = end
        else:
            *_, number, call = turn.shape
            stand_in = self.stand_ins[call - FIRST]
            stand_in.slope = source
            stand_in.gradients[number - FIRST] = end

    def _sources(self, a: int) -> Iterator[int]:
        """Unmarked arrays that a marked one follows from.

        Without constants, and without what the forward pass made: the slope of a square follows
        from the squared sum, too.
        """
        if not _is_marked(self._graph, a):
            if self._graph.arrays[a].role != "constant":
                yield a
        elif a not in self._turned_forward and a in self._makers:
            maker = self._makers[a]
            node = self._graph.nodes[maker]
            for x in node.inputs:
                yield from self._sources(x)

    def _ends(self, a: int) -> Iterator[int]:
        """The unmarked array that follows from a marked one before any slope does, if needed."""
        if not _is_marked(self._graph, a):
            yield a
        elif a not in self._turned_back:
            for x in self._readers.get(a, ()):
                yield from self._ends(x)
