"""Puts the graph of a step together out of pieces, each a function that is read once.

``BlockwiseGraph`` adds the pieces of a blockwise step in the order in which the step runs them:
the graph of a block that comes eighty times is read at its first use and copied afterwards, which
is arithmetic. Runs on the MLX thread. Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple

import mlx.core as mx

from qlab.core.graph.graph import Array, Graph
from qlab.core.graph.unmerge import unmerged
from qlab.engine.memory.read_graph import compiled, read

Outputs = list[mx.array]
Function = Callable[..., Outputs]
AsRun = Callable[[Graph], Graph]


class Placed(NamedTuple):
    """An array of the graph that is put together.

    Attributes:
        id: its id there.
        like: a lazy array of its shape and dtype, for reading the pieces that take it; never
            computed.
    """

    id: int
    like: mx.array


class _Piece(NamedTuple):
    """A function that was read.

    Attributes:
        graph: what it does.
        constants: ids in the whole graph of its constants, by their ids in the piece; filled when
            the piece is added for the first time, so that all copies share them.
        outputs: lazy arrays of the shapes and dtypes that it returns.
    """

    graph: Graph
    constants: dict[int, int]
    outputs: Outputs


class PieceGraph:
    """A graph that grows piece by piece.

    Attributes:
        graph: what has been put together so far.
    """

    def __init__(self) -> None:
        self.graph = Graph()
        self._pieces: dict[Hashable, _Piece] = {}

    def add_input(self, array: mx.array, role: str) -> Placed:
        """Take in an array that is there before the step begins.

        Args:
            array: of its shape and dtype; may be lazy, and stays so.
            role: what it is for; see ``Array``.
        """
        itemsize = array.dtype.size
        node = Array(array.shape, itemsize, role)
        node_id = self.graph.add(node)
        return Placed(node_id, array)

    def add(self, key: Hashable, function: Function, inputs: Sequence[Placed]) -> list[Placed]:
        """Add a function that the step runs operation by operation; return its outputs.

        Args:
            key: pieces with equal keys are the same function of arrays of the same shapes.
            function: takes the inputs as arrays, returns a list; called only at the key's first
                use, to be read.
            inputs: what it takes.
        """
        return self._add(key, function, inputs, unmerged)

    def add_compiled(
        self, key: Hashable, function: Function, inputs: Sequence[Placed]
    ) -> list[Placed]:
        """Add a function that the step runs through ``mx.compile``; see ``add``."""
        return self._add(key, function, inputs, compiled)

    def _add(
        self,
        key: Hashable,
        function: Function,
        inputs: Sequence[Placed],
        as_run: AsRun,
    ) -> list[Placed]:
        if key not in self._pieces:
            examples = [placed.like for placed in inputs]
            self._pieces[key] = _read(function, examples, as_run)
        piece = self._pieces[key]
        input_ids = [placed.id for placed in inputs]
        output_ids = self.graph.then(piece.graph, input_ids, piece.constants)
        pairs = zip(output_ids, piece.outputs, strict=True)
        return [Placed(*pair) for pair in pairs]

    def hand_over(self, arrays: Iterable[Placed], window: int) -> None:
        """Hand arrays over to be computed, as ``_InFlight.add`` of the blockwise step does.

        Args:
            arrays: what is asked for together.
            window: the host goes on once fewer than so many handovers are unfinished.
        """
        ids = [placed.id for placed in arrays]
        self.graph.hand_over(ids, window)


def _read(function: Function, examples: Sequence[mx.array], as_run: AsRun) -> _Piece:
    likes: Outputs = []

    def run(*arrays: mx.array) -> Outputs:
        outputs = function(*arrays)
        likes[:] = [mx.zeros(output.shape, output.dtype) for output in outputs]
        return outputs

    as_read = read(run, examples)
    graph = as_run(as_read)
    return _Piece(graph, {}, likes)
