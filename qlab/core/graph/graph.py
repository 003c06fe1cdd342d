"""A computation as a graph of arrays that need not exist. Knows no framework."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod


@dataclass(frozen=True, slots=True)
class Array:
    """One array.

    Attributes:
        shape: its shape.
        itemsize: bytes of one element.
        role: what it is for: ``weights``, ``adapter``, ``optimizer``, ``batch`` or ``constant`` for
            an input; ``gradients`` for what the update makes of them; else empty.
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
    """

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    arguments: tuple = ()

    def renamed(self, new: Mapping[int, int]) -> Node:
        """Return the same operation on other arrays, by the ids of its own."""
        return Node(
            self.name,
            tuple([new[a] for a in self.inputs]),
            tuple([new[a] for a in self.outputs]),
            self.arguments,
        )


@dataclass
class Graph:
    """A computation.

    Attributes:
        arrays: by id.
        nodes: each after those that make its inputs.
        inputs: ids, in the order in which they are given.
        outputs: ids, in the order in which they are asked for.
        held: ids of arrays that are kept to the end though nobody asks for them.
        rounds: what is asked for round by round, where a computation is handed over in several;
            empty if it is in one.
        windows: for each round, the number of unfinished ones below which the host waits once it is
            handed over.
    """

    arrays: dict[int, Array] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    rounds: list[tuple[int, ...]] = field(default_factory=list)
    windows: list[int] = field(default_factory=list)

    def makers(self) -> dict[int, int]:
        """Index of the node that makes an array, by the array's id; inputs have none."""
        return {output: n for n, node in enumerate(self.nodes) for output in node.outputs}

    def add(self, array: Array) -> int:
        """Take an array in; return its id."""
        self.arrays[len(self.arrays)] = array
        return len(self.arrays) - 1

    def needed(self) -> Graph:
        """Return a copy without what nobody asks for."""
        asked = set(self.outputs)
        nodes = []
        for node in reversed(self.nodes):
            if not asked.isdisjoint(node.outputs):
                asked.update(node.inputs)
                nodes.append(node)
        made = Graph()
        made.inputs = [made.add(self.arrays[a]) for a in self.inputs]
        made.outputs = made.then(replace(self, nodes=nodes[::-1]), made.inputs, {})
        return made

    def then(
        self, piece: Graph, inputs: Iterable[int], constants: dict[int, int], role: str = ""
    ) -> list[int]:
        """Go on with a copy of another computation; return the ids of its outputs.

        Args:
            piece: the other.
            inputs: ids of what it is given, here.
            constants: ids of its constants, here, by their own; those that are missing are added.
            role: of what it makes.
        """
        new = dict(zip(piece.inputs, inputs, strict=True))
        for a, array in piece.arrays.items():
            if array.role == "constant" and a not in new:
                new[a] = (
                    constants[a] if a in constants else constants.setdefault(a, self.add(array))
                )
        for node in piece.nodes:
            for a in node.outputs:
                array = piece.arrays[a]
                new[a] = self.add(array if array.role == role else replace(array, role=role))
            self.nodes.append(node.renamed(new))
        return [new[a] for a in piece.outputs]
