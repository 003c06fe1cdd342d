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
        inputs = tuple(new.get(a, a) for a in node.inputs)
        node = node._replace(inputs=inputs)
        if inputs and node.name not in _NEVER_EQUAL:
            form = _form(graph, node)
            equal = known.setdefault(form, node)
            if equal is not node:
                pairs = zip(node.outputs, equal.outputs, strict=True)
                new.update(pairs)
                continue
        merged.nodes.append(node)
    merged.outputs = [new.get(a, a) for a in graph.outputs]
    return merged


def _form(graph: Graph, node: Node) -> Hashable:
    """Equal for nodes that compute the same."""
    arguments = repr(node.arguments)
    shapes = tuple(graph.arrays[a].shape for a in node.outputs)
    return node.name, node.inputs, arguments, shapes


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
                readers = self._readers.setdefault(a, [])
                readers.append(n)

    def run(self) -> Graph:
        for n in reversed(range(len(self._graph.nodes))):
            node = self._nodes[n]
            if node is None or node.name == "Broadcast":
                continue
            if node.name in FUSABLE:
                self._fuse(n)
        nodes = [node for node in self._nodes if node is not None]
        return replace(self._graph, arrays=self._arrays, nodes=nodes)

    def _fuse(self, root: int) -> None:
        """Let a node take in what it is made from, as far as no other node reads that."""
        run = _Run(self, root)
        result = self.node(root).outputs[0]
        run.search(result, 0)
        if len(run.nodes) > 1:
            self._replace(root, run.nodes)

    def node(self, n: int) -> Node:
        """A node that has not gone into another."""
        node = self._nodes[n]
        assert node is not None
        return node

    def maker(self, a: int) -> tuple[int, Node | None]:
        """Index of the node that makes an array, and that node; −1 and None for an input."""
        n = self._makers.get(a)
        if n is None:
            return -1, None
        return n, self._nodes[n]

    def shape(self, a: int) -> Shape:
        """Shape of an array."""
        return self._arrays[a].shape

    def is_output(self, a: int) -> bool:
        """Whether the graph is asked for an array."""
        return a in self._outputs

    def is_read_outside(self, a: int, nodes: set[int]) -> bool:
        """Whether any other node than these reads an array."""
        readers = self._readers.get(a, ())
        return any(reader not in nodes for reader in readers)

    def split(self, a: int, inside: set[int]) -> int:
        """Give the readers inside a run a copy of a broadcast array; return its id."""
        original = self.node(self._makers[a])
        copy = len(self._arrays)
        maker = len(self._nodes)
        self._arrays[copy] = self._arrays[a]
        copy_node = original._replace(outputs=(copy,))
        self._nodes.append(copy_node)
        self._makers[copy] = maker
        for x in original.inputs:
            readers = self._readers.setdefault(x, [])
            readers.append(maker)
        readers = self._readers[a]
        self._readers[copy] = [reader for reader in readers if reader in inside]
        self._readers[a] = [reader for reader in readers if reader not in inside]
        for reader in set(self._readers[copy]):
            node = self.node(reader)
            inputs = tuple(copy if x == a else x for x in node.inputs)
            self._nodes[reader] = node._replace(inputs=inputs)
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
            readers = self._readers.get(a, ())
            others = [reader for reader in readers if reader not in nodes]
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
        result = fusion.node(root).outputs[0]
        self._shape = fusion.shape(result)
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
                copy = self._fusion.split(a, self.nodes)
                self.search(copy, depth)
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
        if depth >= _MAX_DEPTH or node.name not in FUSABLE:
            return False
        if not self._fusion.is_output(a):
            return True
        shape = self._fusion.shape(a)
        return shape == self._shape
