"""What ``mx.compile`` makes of a graph: runs of elementwise operations become one.

What was between them never exists in memory. ``engine/memory`` fuses the pieces of a step that the
step compiles. Follows ``compile_fuse`` and ``compile_simplify`` of MLX 0.32 (``mlx/compile.cpp``),
whose limits and order of search decide where a run is cut. Knows no framework.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

from qlab.core.graph.graph import Graph, Node, Shape
from qlab.core.graph.primitives import FUSABLE

_MAX_DEPTH = 11  # max_compile_depth
_MAX_ARRAYS = 24  # max_compile_arrays
# never taken for equal, as is nothing without inputs (Primitive::is_equivalent)
_NEVER_EQUAL = {"Depends", "CustomTransforms"}


def fused(graph: Graph) -> Graph:
    """Return the graph as it is after compilation; inputs and outputs stay what they are."""
    return _Fusion(_merged(graph)).run()


def _merged(graph: Graph) -> Graph:
    """Make one node of equal nodes.

    Reading has done so in each graph, but not in graphs that were put together.
    """
    merged = replace(graph, nodes=[])
    new: dict[int, int] = {}  # the array that stays, by the id of one that is equal
    known: dict[Hashable, Node] = {}
    for node in graph.nodes:
        node = replace(node, inputs=tuple(new.get(a, a) for a in node.inputs))
        shapes = tuple(graph.arrays[a].shape for a in node.outputs)
        form = (node.name, node.inputs, repr(node.arguments), shapes)
        may_be_equal = bool(node.inputs) and node.name not in _NEVER_EQUAL
        if may_be_equal and form in known:
            new.update(zip(node.outputs, known[form].outputs, strict=True))
            continue
        if may_be_equal:
            known[form] = node
        merged.nodes.append(node)
    merged.outputs = [new.get(a, a) for a in graph.outputs]
    return merged


class _Fusion:
    """One pass over a graph, from its last operation to its first."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._makers = graph.makers()
        self._arrays = dict(graph.arrays)
        self._outputs = set(graph.outputs)
        # None where a node has gone into another
        self._nodes: list[Node | None] = list(graph.nodes)
        self._readers: dict[int, list[int]] = {}  # nodes that read an array, by its id
        for n, node in enumerate(graph.nodes):
            for a in node.inputs:
                self._readers.setdefault(a, []).append(n)

    def run(self) -> Graph:
        for n in reversed(range(len(self._graph.nodes))):
            node = self._nodes[n]
            if node is not None and node.name in FUSABLE and node.name != "Broadcast":
                self._fuse(n)
        nodes = [node for node in self._nodes if node is not None]
        return replace(self._graph, arrays=self._arrays, nodes=nodes)

    def _fuse(self, root: int) -> None:
        """Let a node take in what it is made from, as far as no other node reads that."""
        run = _Run(self, root)
        run.search(self.node(root).outputs[0], 0)
        if len(run.nodes) > 1:
            self._replace(root, run.nodes)

    def node(self, n: int) -> Node:
        """A node that has not gone into another."""
        node = self._nodes[n]
        assert node is not None
        return node

    def maker(self, a: int) -> tuple[int, Node | None]:
        """Index of the node that makes an array, and that node; −1 and None for an input."""
        n = self._makers.get(a, -1)
        return n, self._nodes[n] if n >= 0 else None

    def shape(self, a: int) -> Shape:
        """Shape of an array."""
        return self._arrays[a].shape

    def is_output(self, a: int) -> bool:
        """Whether the graph is asked for an array."""
        return a in self._outputs

    def is_read_outside(self, a: int, nodes: set[int]) -> bool:
        """Whether any other node than these reads an array."""
        return any(reader not in nodes for reader in self._readers.get(a, ()))

    def split(self, a: int, inside: set[int]) -> int:
        """Give the readers inside a run a copy of a broadcast array; return its id."""
        original = self.node(self._makers[a])
        copy = len(self._arrays)
        maker = len(self._nodes)
        self._arrays[copy] = self._arrays[a]
        self._nodes.append(replace(original, outputs=(copy,)))
        self._makers[copy] = maker
        for x in original.inputs:
            self._readers.setdefault(x, []).append(maker)
        readers = self._readers[a]
        self._readers[copy] = [reader for reader in readers if reader in inside]
        self._readers[a] = [reader for reader in readers if reader not in inside]
        for reader in set(self._readers[copy]):
            node = self.node(reader)
            inputs = tuple(copy if x == a else x for x in node.inputs)
            self._nodes[reader] = replace(node, inputs=inputs)
        return copy

    def _replace(self, root: int, nodes: set[int]) -> None:
        """Put one node in the place of a run."""
        result = self.node(root).outputs[0]
        inside = {self.node(n).outputs[0]: n for n in nodes}
        inputs: dict[int, None] = {}  # in the order in which they are met
        outputs: list[int] = []
        seen: set[int] = set()

        def collect(a: int) -> None:
            if a not in inside:
                inputs[a] = None
            elif a not in seen:
                seen.add(a)
                for x in self.node(inside[a]).inputs:
                    collect(x)
                if a in self._outputs and a != result:
                    outputs.append(a)

        collect(result)
        outputs.append(result)
        for a in inputs:
            others = [reader for reader in self._readers.get(a, ()) if reader not in nodes]
            self._readers[a] = [*others, root]
        for n in nodes - {root}:
            self._nodes[n] = None
        for a in outputs:
            self._makers[a] = root
        for a in seen - set(outputs):
            self._readers.pop(a, None)
        self._nodes[root] = Node("Compiled", tuple(inputs), tuple(outputs))


class _Run:
    """The operations that become one with a root, found depth first from it.

    Args:
        fusion: the graph.
        root: index of the last operation of the run.

    Attributes:
        nodes: indices of the operations.
    """

    def __init__(self, fusion: _Fusion, root: int) -> None:
        self._fusion = fusion
        self._shape = fusion.shape(fusion.node(root).outputs[0])
        self._edge: set[int] = set()  # arrays that the run reads from outside, or gives outside
        self.nodes: set[int] = set()

    def search(self, a: int, depth: int) -> None:
        """Take in the node that makes an array, and what it is made from, if that may be."""
        n, node = self._fusion.maker(a)
        if n in self.nodes:
            return
        if node is None or not self._may_fuse(node, a, depth):
            self._edge.add(a)
            return
        if depth and self._fusion.is_read_outside(a, self.nodes):
            # a broadcast costs nothing, so each reader may have a copy
            if node.name == "Broadcast" and len(self._edge) < _MAX_ARRAYS:
                self.search(self._fusion.split(a, self.nodes), depth)
            else:
                self._edge.add(a)
            return
        if self._fusion.is_output(a):
            self._edge.add(a)
        else:
            self._edge.discard(a)
        if len(self._edge) >= _MAX_ARRAYS:
            return
        self.nodes.add(n)
        for x in node.inputs:
            self.search(x, depth + 1)

    def _may_fuse(self, node: Node, a: int, depth: int) -> bool:
        is_other_output = self._fusion.is_output(a) and self._fusion.shape(a) != self._shape
        return depth < _MAX_DEPTH and node.name in FUSABLE and not is_other_output
