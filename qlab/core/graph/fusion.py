"""What a compiler makes of a graph.

Runs of elementwise operations become one, and what is between them never exists.

Follows ``compile_fuse`` of MLX 0.32 (``mlx/compile.cpp``). Knows no framework.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qlab.core.graph.graph import Graph, Node

_DEPTH = 11  # max_compile_depth
_MOST_ARRAYS = 24  # max_compile_arrays
FUSABLE = {
    "Abs",
    "ArcCos",
    "ArcCosh",
    "ArcSin",
    "ArcSinh",
    "ArcTan",
    "ArcTan2",
    "ArcTanh",
    "AsType",
    "BitwiseBinary",
    "BitwiseInvert",
    "Ceil",
    "Conjugate",
    "Cos",
    "Cosh",
    "Erf",
    "ErfInv",
    "Exp",
    "Expm1",
    "Floor",
    "Imag",
    "Log",
    "Log1p",
    "LogicalNot",
    "Negative",
    "Real",
    "Remainder",
    "Round",
    "Sigmoid",
    "Sign",
    "Sin",
    "Sinh",
    "Sqrt",
    "Square",
    "Tan",
    "Tanh",
    "Add",
    "Divide",
    "Equal",
    "Greater",
    "GreaterEqual",
    "Less",
    "LessEqual",
    "LogAddExp",
    "LogicalAnd",
    "LogicalOr",
    "Maximum",
    "Minimum",
    "Multiply",
    "NotEqual",
    "Power",
    "Subtract",
    "Select",
    "Broadcast",
}


_ALONE = {
    "Depends",
    "CustomTransforms",
}  # never taken for equal, as is nothing without inputs (Primitive::is_equivalent)


def fused(graph: Graph) -> Graph:
    """Return the graph as it is after compilation; what it asks for and what it is given stay."""
    return _Fusion(_merged(graph)).run()


def _merged(graph: Graph) -> Graph:
    """Make one of what is equal.

    Reading has done so in each graph, but not in graphs that were put together.
    """
    made = replace(graph, nodes=[])
    new = {}
    known = {}
    for node in graph.nodes:
        node = replace(node, inputs=tuple(new.get(a, a) for a in node.inputs))
        look = (
            node.name,
            node.inputs,
            repr(node.arguments),
            tuple(graph.arrays[a].shape for a in node.outputs),
        )
        if node.inputs and node.name not in _ALONE and known.setdefault(look, node) is not node:
            new.update(zip(node.outputs, known[look].outputs, strict=True))
        else:
            made.nodes.append(node)
    made.outputs = [new.get(a, a) for a in graph.outputs]
    return made


class _Fusion:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.makers = graph.makers()
        self.arrays = dict(graph.arrays)
        self.outputs = set(graph.outputs)
        self.nodes: list[Any] = list(graph.nodes)  # None where a node has gone into another
        self.readers: dict[int, list[int]] = {}
        for n, node in enumerate(graph.nodes):
            for a in node.inputs:
                self.readers.setdefault(a, []).append(n)

    def run(self) -> Graph:
        for n in reversed(range(len(self.graph.nodes))):
            node = self.nodes[n]
            if node is not None and node.name in FUSABLE and node.name != "Broadcast":
                self._fuse(n)
        nodes = [node for node in self.nodes if node is not None]
        return replace(self.graph, arrays=self.arrays, nodes=nodes)

    def _fuse(self, root: int) -> None:
        """Let a node take in what it is made from, as far as nobody else needs that."""
        taken: set[int] = set()
        edge: set[int] = set()
        shape = self.arrays[self.nodes[root].outputs[0]].shape

        def look(a: int, depth: int) -> None:
            n = self.makers.get(a, -1)
            node = self.nodes[n] if n >= 0 else None
            if n in taken:
                return
            if (
                node is None
                or depth >= _DEPTH
                or node.name not in FUSABLE
                or a in self.outputs
                and self.arrays[a].shape != shape
            ):
                edge.add(a)
                return
            if depth and not all(reader in taken for reader in self.readers.get(a, ())):
                # a broadcast costs nothing, so each reader may have its own
                if node.name == "Broadcast" and len(edge) < _MOST_ARRAYS:
                    look(self._split(a, taken), depth)
                else:
                    edge.add(a)
                return
            if a in self.outputs:
                edge.add(a)
            else:
                edge.discard(a)
            if len(edge) >= _MOST_ARRAYS:
                return
            taken.add(n)
            for x in node.inputs:
                look(x, depth + 1)

        look(self.nodes[root].outputs[0], 0)
        if len(taken) > 1:
            self._replace(root, taken)

    def _split(self, a: int, taken: set[int]) -> int:
        """Give the readers within a copy of a broadcast; return its id."""
        n = self.makers[a]
        copy = len(self.arrays)
        at = len(self.nodes)
        self.arrays[copy] = self.arrays[a]
        self.nodes.append(replace(self.nodes[n], outputs=(copy,)))
        self.makers[copy] = at
        for x in self.nodes[at].inputs:
            self.readers.setdefault(x, []).append(at)
        inside = [reader for reader in self.readers[a] if reader in taken]
        self.readers[copy] = inside
        self.readers[a] = [reader for reader in self.readers[a] if reader not in taken]
        for reader in set(inside):
            node = self.nodes[reader]
            self.nodes[reader] = replace(
                node, inputs=tuple(copy if x == a else x for x in node.inputs)
            )
        return copy

    def _replace(self, root: int, taken: set[int]) -> None:
        made = {self.nodes[n].outputs[0]: n for n in taken}
        inputs: dict[int, None] = {}
        seen: set[int] = set()
        outputs: list[int] = []

        def collect(a: int) -> None:
            if a not in made:
                inputs[a] = None
            elif a not in seen:
                seen.add(a)
                for x in self.nodes[made[a]].inputs:
                    collect(x)
                if a in self.outputs and made[a] != root:
                    outputs.append(a)

        collect(self.nodes[root].outputs[0])
        for a in inputs:
            self.readers[a] = [
                reader for reader in self.readers.get(a, ()) if reader not in taken
            ] + [root]
        outputs.append(self.nodes[root].outputs[0])
        for n in taken - {root}:
            self.nodes[n] = None
        for a in outputs:
            self.makers[a] = root
        for a in seen - set(outputs):
            self.readers.pop(a, None)
        self.nodes[root] = Node("Compiled", tuple(inputs), tuple(outputs))
