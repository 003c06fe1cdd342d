"""Which buffer each array of a graph is in: views, donation and copies as MLX's CPU makes them.

``simulate`` asks it for every operation, in the order of evaluation. An array is a shape and
strides over a buffer. An operation either *allocates* a buffer for its output, or *shares* one:
a view looks at its input's buffer, and an operation may take over ("donate") the buffer of an
input that nothing else needs. Follows MLX 0.32, of which each rule names the place. Knows no
framework.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from math import prod
from typing import NamedTuple

from qlab.core.graph.graph import Graph, Node, Shape
from qlab.core.graph.primitives import ELEMENTWISE, IN_PLACE, PRODUCTS, SHAPES, VIEWS
from qlab.core.graph.strides import (
    Strides,
    dense_strides,
    gapless_elements,
    is_dense,
    regrouped_strides,
)

_DONATION_SLACK = 16384  # bytes too many that a donated buffer may have (``is_donatable``)


class Change(Enum):
    """What happens to a buffer."""

    TAKEN = auto()
    """It is allocated."""
    FREED = auto()
    """No array is in it any more, and the device is done with it."""
    IDLE = auto()
    """No array is in it any more, but an operation that the device has not run yet reads it."""
    LANDED = auto()
    """The device has run the last operation that read an idle buffer: it is free."""


@dataclass
class Buffer:
    """A piece of memory.

    Attributes:
        array: id of the array that it was allocated for.
        nbytes: its size.
        arrays: number of arrays that are in it.
        flights: number of operations that hold it until the device has run them.
    """

    array: int
    nbytes: int
    arrays: int = 1
    flights: int = 0


class _Stored(NamedTuple):
    """How an array lies in its buffer.

    Attributes:
        strides: in elements.
        elements: that are stored; fewer than the array has where some are read several times.
    """

    strides: Strides
    elements: int


class Buffers:
    """The buffers of a graph that is being evaluated.

    Args:
        graph: the computation.
        readers: how often each array will still be read, by id; those that stay count once more.
        kernels: whether it runs on a GPU.
        record: called with each change of a buffer.
    """

    def __init__(
        self,
        graph: Graph,
        readers: dict[int, int],
        kernels: bool,
        record: Callable[[Buffer, Change], None],
    ) -> None:
        self._graph = graph
        self._readers = readers
        self._kernels = kernels
        self._record = record
        self._buffers: dict[int, Buffer] = {}  # by array id
        self._stored: dict[int, _Stored] = {}  # by array id

    def __getitem__(self, a: int) -> Buffer:
        return self._buffers[a]

    def is_new(self, a: int) -> bool:
        """Whether an array's buffer was allocated for it."""
        return self._buffers[a].array == a

    def allocate(self, a: int) -> None:
        """Give an array a buffer of its own, stored whole."""
        array = self._graph.arrays[a]
        self._allocate(a, _Stored(dense_strides(array.shape), array.size), array.nbytes)

    def read(self, a: int) -> None:
        """Count one reader of an array less; the last lets it go."""
        self._readers[a] -= 1
        if not self._readers[a]:
            self.drop(a)

    def drop(self, a: int) -> None:
        """Let an array go, and its buffer with the last array in it."""
        self.leave(self._buffers[a])

    def leave(self, buffer: Buffer) -> None:
        """Take one array out of a buffer."""
        buffer.arrays -= 1
        if not buffer.arrays:
            self._record(buffer, Change.IDLE if buffer.flights else Change.FREED)

    def evaluate(self, node: Node) -> list[Buffer]:
        """Give the outputs of an operation their buffers; return the temporary ones."""
        if node.name in VIEWS:
            self._view(node)
        elif node.name in SHAPES:
            self._reshape(node)
        elif node.name in ELEMENTWISE:
            self._elementwise(node)
        elif (target := self.target(node)) is not None:
            self._in_place(node, target)
        else:
            for a in node.outputs:
                self.allocate(a)
        if node.name not in PRODUCTS:
            return []
        copies = [self._copied(a, node.name) for a in node.inputs[:2]]
        return [copy for copy in copies if copy is not None]

    def target(self, node: Node) -> int | None:
        """Return which input an operation writes over where it may, or None."""
        if node.name == "AddMM":
            # the CPU's product adds to a copy of the third operand; a GPU's kernel reads all three
            return None if self._kernels else 2
        return 0 if node.name in IN_PLACE else None

    # --- rules ------------------------------------------------------------------------------------

    def _elementwise(self, node: Node) -> None:
        """``set_unary_output_data``, ``set_binary_op_output_data`` (``backend/common``).

        A single number is spread over the others and gives nothing; an input whose buffer may be
        written over is, the first that can be; otherwise the output lies as its inputs do where
        these agree, so that a function of a broadcast array is as small as what was broadcast.
        """
        shape = self._graph.arrays[node.outputs[0]].shape
        vectors = [a for a in node.inputs if self._stored[a].elements != 1]
        if not vectors:
            for a in node.outputs:
                number = _Stored((0,) * len(shape), 1)
                self._allocate(a, number, self._graph.arrays[a].itemsize)
            return
        common = self._common(vectors, shape)
        for a in node.outputs:
            donors = (
                x
                for x in vectors
                if self._may_donate(node, x, a) and (common is not None or self._is_dense(x))
            )
            donor = next(donors, None)
            if donor is not None:
                self._share(a, donor, self._stored[donor].strides)
            elif common is not None:
                self._allocate(a, common, common.elements * self._graph.arrays[a].itemsize)
            else:
                self.allocate(a)

    def _common(self, vectors: list[int], shape: Shape) -> _Stored | None:
        """How a result lies that is laid out as its operands are; None if it is laid out anew.

        ``get_binary_op_type``: operands agree if all are row-contiguous, or all column-contiguous.
        """
        if any(self._graph.arrays[a].shape != shape for a in vectors):
            return None
        first = self._stored[vectors[0]]
        if len(vectors) == 1:
            is_gapless = gapless_elements(shape, first.strides) == first.elements
            return first if is_gapless else None
        if all(self._is_dense(a) for a in vectors):
            return first
        turned = [self._stored[a].strides[::-1] for a in vectors]
        by_columns = all(is_dense(shape[::-1], strides) for strides in turned)
        return first if by_columns else None

    def _may_donate(self, node: Node, a: int, to: int) -> bool:
        """Whether an input's buffer may become that of an output (``is_donatable``, ``utils.h``).

        It may if this operation is the last that needs the array and the array is alone in its
        buffer; and if the buffer has about the right size. Where there are several outputs, each
        holds on to the inputs.
        """
        buffer = self._buffers[a]
        array = self._graph.arrays[a]
        output = self._graph.arrays[to]
        is_last_reader = self._readers[a] == node.inputs.count(a) == 1
        is_alone = buffer.arrays == 1 and not buffer.flights
        fits = (
            array.itemsize == output.itemsize
            and array.size == output.size
            and buffer.nbytes <= output.nbytes + _DONATION_SLACK
        )
        return len(node.outputs) == 1 and is_last_reader and is_alone and fits

    def _in_place(self, node: Node, target: int) -> None:
        """Softmax, norms, updates of slices: they write over their input if they may."""
        x = node.inputs[target]
        has_dense_rows = self._stored[x].strides[-1:] in ((1,), ())
        for n, a in enumerate(node.outputs):
            if n == 0 and has_dense_rows and self._may_donate(node, x, a):
                self._share(a, x, self._stored[x].strides)
            else:
                self.allocate(a)

    def _copied(self, a: int, product: str) -> Buffer | None:
        """Return a temporary copy of an operand that a product cannot read as it lies, or None.

        The rows or the columns of a matrix must be dense (``mlx/backend/cpu/matmul.cpp``);
        quantized products take dense rows only (``quantized.cpp`` there).
        """
        shape = self._graph.arrays[a].shape
        if len(shape) < 2:
            return None
        rows, columns = self._stored[a].strides[-2:]
        is_plain = columns == 1 and (rows in (shape[-1], 0) or shape[-2] == 1)
        is_turned = rows == 1 and columns == shape[-2]
        if is_plain or (is_turned and product in ("Matmul", "AddMM")):
            return None
        buffer = Buffer(a, self._graph.arrays[a].nbytes)
        self._record(buffer, Change.TAKEN)
        return buffer

    def _view(self, node: Node) -> None:
        source = node.inputs[0]
        strides = self._stored[source].strides
        shape = self._graph.arrays[source].shape
        for n, a in enumerate(node.outputs):
            to = self._graph.arrays[a].shape
            if node.name == "Depends":  # each output is one of the inputs
                self._share_whole(a, node.inputs[n])
            elif node.name == "CustomTransforms":
                # after what the function was given come the arrays that it gives
                self._share_whole(a, node.inputs[n - len(node.outputs)])
            elif node.name == "Transpose":
                self._share(a, source, tuple(strides[axis] for axis in node.arguments[0]))
            elif node.name == "Broadcast":
                self._share(a, source, _broadcast_strides(shape, strides, to))
            elif node.name in ("ExpandDims", "Squeeze"):
                used = iter([t for s, t in zip(shape, strides, strict=True) if s != 1])
                self._share(a, source, tuple(1 if s == 1 else next(used) for s in to))
            else:  # a slice: of the same axes, or laid out anew
                new = strides if len(to) == len(shape) else dense_strides(to)
                self._share(a, source, new, self._graph.arrays[a].size)

    def _reshape(self, node: Node) -> None:
        """A view of the input where its strides allow that, else a copy."""
        source = node.inputs[0]
        (a,) = node.outputs
        to = self._graph.arrays[a].shape
        stored = self._stored[source]
        if node.name == "View":  # the same bytes as another dtype
            self._share(a, source, dense_strides(to), self._graph.arrays[a].size)
            return
        strides = regrouped_strides(self._graph.arrays[source].shape, stored.strides, to)
        if strides is None and stored.elements == 1:
            strides = dense_strides(to)
        if strides is None:
            self.allocate(a)
        else:
            self._share(a, source, strides)

    # --- bookkeeping ------------------------------------------------------------------------------

    def _allocate(self, a: int, stored: _Stored, nbytes: int) -> None:
        self._buffers[a] = Buffer(a, nbytes)
        self._stored[a] = stored
        self._record(self._buffers[a], Change.TAKEN)

    def _share(self, a: int, source: int, strides: Strides, elements: int | None = None) -> None:
        """Put an array into another's buffer; as many elements are stored unless stated."""
        self._buffers[a] = self._buffers[source]
        self._buffers[a].arrays += 1
        if elements is None:
            elements = self._stored[source].elements
        self._stored[a] = _Stored(strides, elements)

    def _share_whole(self, a: int, source: int) -> None:
        self._share(a, source, self._stored[source].strides)

    def _is_dense(self, a: int) -> bool:
        shape = self._graph.arrays[a].shape
        stored = self._stored[a]
        return stored.elements == prod(shape) and is_dense(shape, stored.strides)


def _broadcast_strides(shape: Shape, strides: Strides, to: Shape) -> Strides:
    """Strides of an array that is broadcast: 0 along every axis that is repeated."""
    padded = [0] * (len(to) - len(shape))
    padded += [0 if s == 1 else t for s, t in zip(shape, strides, strict=True)]
    return tuple(0 if s == 1 else t for s, t in zip(to, padded, strict=True))
