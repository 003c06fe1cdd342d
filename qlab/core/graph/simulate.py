"""How much memory a graph needs while it is evaluated.

MLX's order, views, donation and work in flight, simulated.

Follows MLX 0.32 (``mlx/transforms.cpp`` for the order, ``mlx/backend/cpu/eval.cpp`` and
``encoder.h`` for what is held until the worker ran it, the primitives' own ``set_…_output_data``
for views and donation). Allocates nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod

import numpy as np

from qlab.core.graph.graph import Graph, Node
from qlab.core.graph.order import order

TAKEN, FREED, IDLE, LANDED = range(4)
_DONATION_SLACK = 16384  # array::is_donatable lets a buffer be this much too large

_VIEWS = {
    "Transpose",
    "Broadcast",
    "ExpandDims",
    "Squeeze",
    "Slice",
    "Split",
    "Depends",
    "Copy",
    "StopGradient",
    "CustomTransforms",
    "AsStrided",
}
_SHAPES = {"Reshape", "Flatten", "Unflatten", "View"}
_ELEMENTWISE = {
    "Abs",
    "Add",
    "ArcCos",
    "ArcTan2",
    "AsType",
    "BitwiseBinary",
    "BitwiseInvert",
    "Ceil",
    "Cos",
    "Divide",
    "Equal",
    "Erf",
    "ErfInv",
    "Exp",
    "Expm1",
    "Floor",
    "Greater",
    "GreaterEqual",
    "Less",
    "LessEqual",
    "Log",
    "Log1p",
    "LogAddExp",
    "LogicalAnd",
    "LogicalNot",
    "LogicalOr",
    "Maximum",
    "Minimum",
    "Multiply",
    "Negative",
    "NotEqual",
    "Power",
    "Remainder",
    "Round",
    "Rsqrt",
    "Select",
    "Sigmoid",
    "Sign",
    "Sin",
    "Sqrt",
    "Square",
    "Subtract",
    "Tan",
    "Tanh",
    "Compiled",
}
_COPYING = {"Scatter", "ScatterAxis", "SliceUpdate", "AddMM"}
_IN_PLACE = {
    "Softmax",
    "RMSNorm",
    "LayerNorm",
    "RoPE",
    "Scatter",
    "ScatterAxis",
    "SliceUpdate",
    "RMSNormVJP",
}
_PRODUCTS = {"Matmul", "AddMM", "QuantizedMatmul", "GatherQMM", "GatherMM"}


@dataclass(frozen=True)
class Runahead:
    """How far a back end's host runs ahead of the device, and so how long buffers are held.

    Dispatches are handed over in tasks, and a run meets every position of a step within its tasks;
    so this counts from the position that holds the most.

    Attributes:
        dispatches: that may be unfinished.
        kernels: whether only what computes is a dispatch; off a GPU a view is one, too.
    """

    dispatches: int = 110
    kernels: bool = False


class Usage:
    """What was in use at every moment of an evaluation.

    Attributes:
        steps: node indices in the order of evaluation.
        events: ``(moment, array id, bytes, kind)``: from that moment on the array's buffer is in
            use (``TAKEN``), free (``FREED``), held only because the device has not caught up
            (``IDLE``), or free after that (``LANDED``).
    """

    def __init__(self, steps: list[int]) -> None:
        self.steps = steps
        self.events: list[tuple[int, int, int, int]] = []

    @cached_property
    def timeline(self) -> np.ndarray:
        """Bytes in use at every moment, idle ones included; int64 ``(steps,)``."""
        made = np.zeros(len(self.steps) + 1, np.int64)
        for moment, _, nbytes, kind in self.events:
            made[moment] += {TAKEN: nbytes, IDLE: 0}.get(kind, -nbytes)
        return np.cumsum(made)[:-1]

    @property
    def peak_nbytes(self) -> int:
        """The greatest use."""
        return int(self.timeline.max())


@dataclass
class _Buffer:
    array: int
    nbytes: int
    arrays: int = 1
    flights: int = 0


def simulate(graph: Graph, runahead: Runahead | None = None) -> Usage:
    """Return what is in use while a graph is evaluated, with its inputs in memory and kept.

    Args:
        graph: the computation.
        runahead: None frees at once what nobody reads any more.
    """
    return _Simulation(graph, runahead).run()


class _Simulation:
    def __init__(self, graph: Graph, runahead: Runahead | None) -> None:
        self.graph = graph
        self.ahead = runahead
        self._kernels = bool(runahead and runahead.kernels)
        self.buffers: dict[int, _Buffer] = {}  # by array id
        self.strides: dict[int, tuple[int, ...]] = {}
        self.stored: dict[int, int] = {}  # elements in the buffer that the array spans
        self.flying: list[tuple[int, list[_Buffer]]] = []
        self.at = 0
        rounds = order(graph)  # what nobody asks for is never evaluated, and keeps nothing alive
        self.steps = [n for each in rounds for n in each]
        self.ends = list(accumulate(map(len, rounds)))
        self.usage = Usage(self.steps)
        self.readers: dict[int, int] = {}
        for a in (a for n in self.steps for a in graph.nodes[n].inputs):
            self.readers[a] = self.readers.get(a, 0) + 1
        made = {o for node in graph.nodes for o in node.outputs}
        for a, array in graph.arrays.items():
            if a not in made:
                self._allocate(a, array.nbytes)
                self.readers[a] = self.readers.get(a, 0) + 1  # inputs stay
        for a in (*graph.outputs, *graph.held):
            self.readers[a] = self.readers.get(a, 0) + 1

    def run(self) -> Usage:
        ahead = self.ahead.dispatches if self.ahead else 0
        issued = 0
        first = 0
        end = 0
        for at, n in enumerate(self.steps):
            self.at = at
            node = self.graph.nodes[n]
            temporary = self._evaluate(node)
            used = {id(self.buffers[a]): self.buffers[a] for a in (*node.inputs, *node.outputs[1:])}
            if node.outputs:
                used.pop(id(self.buffers[node.outputs[0]]), None)
            holds = [*used.values(), *temporary]
            for buffer in holds:
                buffer.flights += 1
            for a in node.inputs:
                self._read(a)
            for a in node.outputs:
                if not self.readers.get(a):
                    self._drop(a)
            for buffer in temporary:
                buffer.arrays -= 1
                self._note(buffer, IDLE)
            issued += self._dispatches(node, len(temporary))
            self.flying.append((issued, holds))
            while first < len(self.flying) and self.flying[first][0] <= issued - ahead:
                self._land(first)
                first += 1
            while at + 1 == self.ends[end] and end + 1 < len(
                self.ends
            ):  # the round is handed over; the host waits
                window = self.graph.windows[end]
                end = end + 1
                for late in range(first, self.ends[end - window] if window <= end else 0):
                    self._land(late)
                    first = late + 1
        return self.usage

    def _dispatches(self, node: Node, copies: int) -> int:
        """Those that compute, and off a GPU one that releases what the operation read."""
        if node.name in _VIEWS or (
            node.name in _SHAPES and self.buffers[node.outputs[0]].array != node.outputs[0]
        ):
            own = 0
        elif node.name == "Concatenate":
            own = len(node.inputs)
        elif (
            node.name in _COPYING
            and self._target(node) is not None
            and self.buffers[node.outputs[0]].array == node.outputs[0]
        ):
            own = 2  # what is not written over is copied first
        else:
            own = 1
        return own + copies + (not self._kernels)

    # --- buffers ----------------------------------------------------------------------------------

    def _allocate(
        self, a: int, nbytes: int, strides: tuple[int, ...] | None = None, stored: int | None = None
    ) -> None:
        array = self.graph.arrays[a]
        self.buffers[a] = _Buffer(a, nbytes)
        self.strides[a] = strides if strides is not None else _dense(array.shape)
        self.stored[a] = stored if stored is not None else array.size
        self._note(self.buffers[a], TAKEN)

    def _share(
        self, a: int, source: int, strides: tuple[int, ...], stored: int | None = None
    ) -> None:
        self.buffers[a] = self.buffers[source]
        self.buffers[a].arrays += 1
        self.strides[a] = strides
        self.stored[a] = self.stored[source] if stored is None else stored

    def _read(self, a: int) -> None:
        self.readers[a] -= 1
        if not self.readers[a]:
            self._drop(a)

    def _drop(self, a: int) -> None:
        buffer = self.buffers[a]
        buffer.arrays -= 1
        if not buffer.arrays:
            self._note(buffer, IDLE if buffer.flights else FREED)

    def _land(self, number: int) -> None:
        """The device has run a step: what it read is held no longer."""
        for buffer in self.flying[number][1]:
            buffer.flights -= 1
            if not buffer.flights and not buffer.arrays:
                self._note(buffer, LANDED)
        self.flying[number] = (0, [])

    def _note(self, buffer: _Buffer, kind: int) -> None:
        self.usage.events.append((self.at + (kind != TAKEN), buffer.array, buffer.nbytes, kind))

    # --- operations -------------------------------------------------------------------------------

    def _evaluate(self, node: Node) -> list[_Buffer]:
        """Give the outputs of a node their buffers; return the temporary ones."""
        if node.name in _VIEWS:
            self._view(node)
        elif node.name in _SHAPES:
            self._reshape(node)
        elif node.name in _ELEMENTWISE:
            self._elementwise(node)
        elif (target := self._target(node)) is not None:
            self._in_place(node, target)
        else:
            for a in node.outputs:
                self._allocate(a, self.graph.arrays[a].nbytes)
        if node.name in _PRODUCTS:
            return [b for a in node.inputs[:2] if (b := self._copied(a, node.name))]
        return []

    def _target(self, node: Node) -> int | None:
        """Which input an operation writes over where it may."""
        if node.name == "AddMM":
            return None if self._kernels else 2  # a GPU reads all three
        return 0 if node.name in _IN_PLACE else None

    def _copied(self, a: int, product: str) -> _Buffer | None:
        """A temporary copy of an operand whose rows are not laid out as the product needs them."""
        shape = self.graph.arrays[a].shape
        strides = self.strides[a]
        if len(shape) < 2:
            return None
        rows, columns = strides[-2:]
        plain = columns == 1 and rows in (shape[-1], 0) or shape[-2] == 1 and columns == 1
        turned = rows == 1 and columns == shape[-2]
        if plain or (turned and product in ("Matmul", "AddMM")):
            return None
        buffer = _Buffer(a, self.graph.arrays[a].nbytes)
        self._note(buffer, TAKEN)
        return buffer

    def _donor(self, node: Node, a: int, to: int) -> bool:
        """Whether an input's buffer may become that of an output.

        Where there are several, each holds on to the inputs.
        """
        buffer = self.buffers[a]
        output = self.graph.arrays[to]
        return (
            len(node.outputs) == 1
            and self.readers[a] == node.inputs.count(a) == 1
            and buffer.arrays == 1
            and not buffer.flights
            and self.graph.arrays[a].itemsize == output.itemsize
            and buffer.nbytes <= output.nbytes + _DONATION_SLACK
            and self.graph.arrays[a].size == output.size
        )

    def _elementwise(self, node: Node) -> None:
        shape = self.graph.arrays[node.outputs[0]].shape
        vectors = [a for a in node.inputs if self.stored[a] != 1]
        if not vectors:
            for a in node.outputs:
                self._allocate(a, self.graph.arrays[a].itemsize, (0,) * len(shape), 1)
            return
        kept = self._common(vectors, shape)
        for a in node.outputs:
            donors = (x for x in vectors if self._donor(node, x, a) and (kept or self._dense(x)))
            if (donor := next(donors, None)) is not None:
                self._share(a, donor, self.strides[donor])
            else:
                strides, stored = kept or (None, self.graph.arrays[a].size)
                self._allocate(a, stored * self.graph.arrays[a].itemsize, strides, stored)

    def _common(
        self, vectors: list[int], shape: tuple[int, ...]
    ) -> tuple[tuple[int, ...], int] | None:
        """Strides and stored elements that a result takes over from its operands.

        None if it is laid out anew.
        """
        first = vectors[0]
        strides = self.strides[first]
        stored = self.stored[first]
        if any(self.graph.arrays[a].shape != shape for a in vectors):
            return None
        if len(vectors) == 1:
            return (strides, stored) if _gapless(shape, strides) == stored else None
        turned = (shape[::-1], *(self.strides[a][::-1] for a in vectors))
        same = all(map(self._dense, vectors)) or all(_is_dense(turned[0], t) for t in turned[1:])
        return (strides, stored) if same else None

    def _dense(self, a: int) -> bool:
        shape = self.graph.arrays[a].shape
        return self.stored[a] == prod(shape) and _is_dense(shape, self.strides[a])

    def _in_place(self, node: Node, target: int) -> None:
        x = node.inputs[target]
        for n, a in enumerate(node.outputs):
            if n == 0 and self.strides[x][-1:] in ((1,), ()) and self._donor(node, x, a):
                self._share(a, x, self.strides[x])
            else:
                self._allocate(a, self.graph.arrays[a].nbytes)

    def _view(self, node: Node) -> None:
        source = node.inputs[0]
        shape = self.graph.arrays[source].shape
        strides = self.strides[source]
        for n, a in enumerate(node.outputs):
            out = self.graph.arrays[a].shape
            if node.name == "Depends":
                self._share(a, node.inputs[n], self.strides[node.inputs[n]])
            elif (
                node.name == "CustomTransforms"
            ):  # after what the function was given comes what it gives
                same = node.inputs[n - len(node.outputs)]
                self._share(a, same, self.strides[same])
            elif node.name == "Transpose":
                self._share(a, source, tuple(strides[axis] for axis in node.arguments[0]))
            elif node.name == "Broadcast":
                padded = (0,) * (len(out) - len(shape)) + tuple(
                    0 if s == 1 else t for s, t in zip(shape, strides, strict=True)
                )
                self._share(
                    a, source, tuple(0 if s == 1 else t for s, t in zip(out, padded, strict=True))
                )
            elif node.name in ("ExpandDims", "Squeeze"):
                kept = [t for s, t in zip(shape, strides, strict=True) if s != 1]
                self._share(a, source, tuple(1 if s == 1 else kept.pop(0) for s in out))
            else:
                self._share(
                    a,
                    source,
                    strides if len(out) == len(shape) else _dense(out),
                    self.graph.arrays[a].size,
                )

    def _reshape(self, node: Node) -> None:
        source = node.inputs[0]
        (a,) = node.outputs
        shape = self.graph.arrays[source].shape
        strides = self.strides[source]
        out = self.graph.arrays[a].shape
        if node.name == "View":
            self._share(a, source, _dense(out), self.graph.arrays[a].size)
        elif (new := _regrouped(shape, strides, out)) is None and self.stored[source] == 1:
            self._share(a, source, _dense(out))
        elif new is not None:
            self._share(a, source, new)
        else:
            self._allocate(a, self.graph.arrays[a].nbytes)


def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


def _is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    return all(s == 1 or t == d for s, t, d in zip(shape, strides, _dense(shape), strict=True))


def _gapless(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements that an array spans, in whatever order and however often.

    0 if there are others between them.
    """
    span = 1
    for stride, size in sorted((t, s) for s, t in zip(shape, strides, strict=True) if s > 1 and t):
        if stride != span:
            return 0
        span *= size
    return span


def _regrouped(
    shape: tuple[int, ...], strides: tuple[int, ...], out: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Strides of a reshape that needs no copy, or None.

    Runs of axes that lie one after the other are cut anew.
    """
    runs: list[tuple[int, int]] = []  # (elements, innermost stride)
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if runs and runs[-1][1] == size * stride:
            runs[-1] = (runs[-1][0] * size, stride)
        else:
            runs.append((size, stride))
    found: list[int] = []
    at = 0
    left = runs[0][0] if runs else 1
    for size in out:
        if size == 1:
            found.append(1)
            continue
        if left == 1:
            at += 1
            left = runs[at][0]
        if left % size:
            return None
        left //= size
        found.append(left * runs[at][1])
    return tuple(found)
