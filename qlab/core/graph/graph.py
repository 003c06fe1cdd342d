"""A computation as a graph of arrays that need not exist.

``engine/memory`` reads a training step into one; the other files of this folder put it in MLX's
order, simulate its memory and turn it into formulas. Knows no framework.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, NamedTuple

Shape = tuple[int, ...]


class Array(NamedTuple):
    """One array.

    A tuple, as ``Node`` is: a step has a hundred thousand of them, and a dataclass that cannot be
    changed takes twice as long to make.

    Attributes:
        shape: its shape.
        itemsize: bytes of one element.
        role: what it is for: ``weights``, ``adapter``, ``optimizer``, ``batch`` or ``constant`` for
            an input; ``gradients`` for what the update makes of them; else empty.
    """

    shape: Shape
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


class Node(NamedTuple):
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
    arguments: tuple[Any, ...] = ()

    def renamed(self, new: Mapping[int, int]) -> Node:
        """Return the same operation on other arrays.

        Args:
            new: ids of those arrays, by the ids of this node's own.
        """
        # lists: a tuple of a generator would cost a third of the time of copying a graph
        inputs = tuple([new[a] for a in self.inputs])
        outputs = tuple([new[a] for a in self.outputs])
        return Node(self.name, inputs, outputs, self.arguments)


class Round(NamedTuple):
    """Arrays that the host hands over to the device together, and then waits a little.

    Attributes:
        arrays: ids of what is asked for.
        window: number of unfinished rounds below which the host goes on.
    """

    arrays: tuple[int, ...]
    window: int = 1


@dataclass(kw_only=True)
class Graph:
    """A computation.

    Attributes:
        arrays: by id.
        nodes: each after those that make its inputs.
        inputs: ids, in the order in which they are given.
        outputs: ids, in the order in which they are asked for.
        held: ids of arrays that stay in memory to the end though they are no outputs.
        rounds: what is asked for round by round, where a computation is handed over in several;
            empty if it is in one.
    """

    arrays: dict[int, Array] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)

    def makers(self) -> dict[int, int]:
        """Index of the node that makes an array, by the array's id; inputs have none."""
        return {output: n for n, node in enumerate(self.nodes) for output in node.outputs}

    def add(self, array: Array) -> int:
        """Take an array in; return its id."""
        self.arrays[len(self.arrays)] = array
        return len(self.arrays) - 1

    def hand_over(self, arrays: Iterable[int], window: int) -> None:
        """End a round of the computation with what is asked for then; see ``Round``."""
        self.rounds.append(Round(tuple(arrays), window))

    def needed(self) -> Graph:
        """Return a copy without what no output depends on."""
        asked = set(self.outputs)
        nodes = []
        for node in reversed(self.nodes):
            if not asked.isdisjoint(node.outputs):
                asked.update(node.inputs)
                nodes.append(node)
        copy = Graph()
        copy.inputs = [copy.add(self.arrays[a]) for a in self.inputs]
        copy.outputs = copy.then(replace(self, nodes=nodes[::-1]), copy.inputs, {})
        return copy

    def then(
        self, piece: Graph, inputs: Iterable[int], constants: dict[int, int], role: str = ""
    ) -> list[int]:
        """Go on with a copy of another computation; return the ids of its outputs.

        Args:
            piece: the other.
            inputs: ids, here, of what it is given.
            constants: ids, here, of its constants, by the ids that they have in the piece; those
                that are missing are added, to the graph and to this dict.
            role: of the arrays that it makes.
        """
        new = dict(zip(piece.inputs, inputs, strict=True))
        for a, array in piece.arrays.items():
            if array.role != "constant" or a in new:
                continue
            if a not in constants:
                constants[a] = self.add(array)
            new[a] = constants[a]
        for node in piece.nodes:
            for a in node.outputs:
                array = piece.arrays[a]
                new[a] = self.add(array if array.role == role else array._replace(role=role))
            self.nodes.append(node.renamed(new))
        return [new[a] for a in piece.outputs]
