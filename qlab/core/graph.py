"""A computation as a graph of arrays that need not exist. Knows no framework."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import prod


@dataclass(frozen=True, slots=True)
class Array:
    """One array.

    Attributes:
        shape: its shape.
        itemsize: bytes of one element.
        role: what it is for: ``weights``, ``adapter``, ``optimizer``, ``batch`` or ``constant`` for an input; else empty.
    """

    shape: tuple[int, ...]
    itemsize: int
    role: str = ""

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes if it is stored whole."""
        return self.size * self.itemsize


@dataclass(frozen=True, slots=True)
class Node:
    """One operation.

    Attributes:
        name: of the primitive, as MLX calls it.
        inputs: ids of arrays.
        outputs: ids of arrays.
        arguments: the primitive's own, such as the axes of a transpose.
        shared: whether its readers really share it, as in a compiled graph; otherwise reading may have merged copies.
    """

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    arguments: tuple = ()
    shared: bool = False


@dataclass
class Graph:
    """A computation.

    Attributes:
        arrays: by id.
        nodes: each after those that make its inputs.
        inputs: ids, in the order in which they are given.
        outputs: ids, in the order in which they are asked for.
        held: ids of arrays that are kept to the end though nobody asks for them.
        rounds: what is asked for round by round, where a computation is handed over in several; empty if it is in one.
        window: rounds that may be unfinished at once; 0 means all.
    """

    arrays: dict[int, Array] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    rounds: list[tuple[int, ...]] = field(default_factory=list)
    window: int = 0

    def makers(self) -> dict[int, int]:
        """Index of the node that makes an array, by the array's id; inputs have none."""
        return {output: n for n, node in enumerate(self.nodes) for output in node.outputs}

    def add(self, array: Array) -> int:
        """Take an array in; return its id."""
        self.arrays[len(self.arrays)] = array
        return len(self.arrays) - 1

    def then(self, piece: Graph, inputs: Iterable[int], constants: dict[int, int]) -> list[int]:
        """Go on with a copy of another computation; return the ids of its outputs.

        Args:
            piece: the other.
            inputs: ids of what it is given, here.
            constants: ids of its constants, here, by their own; those that are missing are added.
        """
        new = dict(zip(piece.inputs, inputs, strict=True))
        for a, array in piece.arrays.items():
            if array.role == "constant" and a not in new:
                new[a] = constants[a] if a in constants else constants.setdefault(a, self.add(array))
        for node in piece.nodes:
            new.update({a: self.add(replace(piece.arrays[a], role="")) for a in node.outputs})
            ids = [tuple(new[a] for a in side) for side in (node.inputs, node.outputs)]
            self.nodes.append(replace(node, inputs=ids[0], outputs=ids[1]))
        return [new[a] for a in piece.outputs]


def unmerged(graph: Graph, weights: bool) -> Graph:
    """Return a graph in which every reader has its own copy of what reading the graph has merged.

    Args:
        graph: as it was read.
        weights: whether to undo it for what follows from frozen weights too: a product with a dequantized weight
            dequantizes again on the way back, once the gradient is there, instead of keeping the dense weight.
    """
    fixed = {a: array.role == "weights" for a, array in graph.arrays.items() if array.role in ("weights", "constant")}
    for node in graph.nodes:
        if all(a in fixed for a in node.inputs):
            fixed.update(dict.fromkeys(node.outputs, any(fixed[a] for a in node.inputs)))
    makers = graph.makers()
    made = replace(graph, arrays=dict(graph.arrays), nodes=[])
    read: set[int] = set()

    def again(a: int, after: int) -> int:
        """Compute an array again, once ``after`` is there; return its new id."""
        chain, leaves = _history(graph, makers, a, fixed)
        new: dict[int, int] = {}

        def copy(x: int) -> int:
            new[x] = len(made.arrays)
            made.arrays[new[x]] = Array(graph.arrays[x].shape, graph.arrays[x].itemsize)
            return new[x]

        if leaves:
            made.nodes.append(Node("Depends", (*leaves, after), tuple(copy(x) for x in leaves)))
        for n in chain:
            node = graph.nodes[n]
            made.nodes.append(
                Node(node.name, tuple(new.get(x, x) for x in node.inputs), tuple(map(copy, node.outputs)), node.arguments)
            )
        return new[a]

    for node in graph.nodes:
        inputs = list(node.inputs)
        others = [a for a in inputs if a not in fixed]
        for i, a in enumerate(inputs):
            if a in makers and others and (weights if fixed.get(a) else a in fixed and graph.nodes[makers[a]].name == "Full"):
                root = _root(graph, makers, a)
                if root in read and root in makers and len(graph.nodes[makers[root]].outputs) == 1:
                    inputs[i] = again(a, others[0])
                read.add(root)
        made.nodes.append(Node(node.name, tuple(inputs), node.outputs, node.arguments))
    return made


def _root(graph: Graph, makers: dict[int, int], a: int) -> int:
    """The array of which this one is only another view."""
    while a in makers and graph.nodes[makers[a]].name == "Transpose":
        a = graph.nodes[makers[a]].inputs[0]
    return a


def _history(graph: Graph, makers: dict[int, int], a: int, fixed: dict[int, bool]) -> tuple[list[int], list[int]]:
    """Nodes that make an array, each after those that it needs, and the weights that they start from."""
    chain: set[int] = set()
    leaves: dict[int, None] = {}
    waiting = [a]
    while waiting:
        x = waiting.pop()
        if x in makers and makers[x] not in chain:
            chain.add(makers[x])
            waiting.extend(graph.nodes[makers[x]].inputs)
        elif x not in makers and fixed.get(x):
            leaves[x] = None
    return sorted(chain), list(leaves)
