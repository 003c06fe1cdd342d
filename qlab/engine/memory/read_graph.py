"""Reads the graph of a function of arrays without computing it.

The pieces of a training step are read so, to simulate their memory. ``mx.export_function`` writes
the graph; it is experimental, and ``tests/engine/memory/test_read_graph.py`` says what is relied
on. Two things it cannot write are read otherwise: functions with custom gradients
(``core/graph/handwritten.py``) and a few of MLX's own operations, for which functions that need
the same arrays stand in. Runs on the MLX thread. Knows no model.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from qlab.core.graph.fusion import fused
from qlab.core.graph.graph import Array, Graph, Node
from qlab.core.graph.handwritten import Halves, handwritten
from qlab.engine.models.functional import Functional, hashable
from qlab.errors import UnsupportedError
from qlab.nn import low_rank
from qlab.ops.custom_gradient import Call, recorded_calls
from qlab.runtime.device import backend

Function = Callable[..., Sequence[mx.array]]


def read(
    function: Function, arrays: Sequence[mx.array], roles: Sequence[str] | None = None
) -> Graph:
    """Return the graph of a function.

    Args:
        function: of arrays; must return them in one list.
        arrays: what it is given; may be lazy, and stays so.
        roles: what each is for; see ``Array``.

    Raises:
        UnsupportedError: it holds an operation that cannot be read.
    """
    replaced: set[str] = set()  # operations that functions stand in for
    while True:
        try:
            with _stand_ins(replaced), recorded_calls() as calls:
                graph = _exported(function, arrays, roles)
            return _with_calls(graph, calls)
        except UnsupportedError as error:
            unreadable = {name for name in _STAND_INS if name in str(error)} - replaced
            if not unreadable:
                raise
            replaced |= unreadable


def compiled(graph: Graph) -> Graph:
    """Return a graph as it is after ``mx.compile`` here.

    On the CPU MLX calls a compiler for fused operations, and does without where there is none.
    """
    fuses = backend() != "cpu" or shutil.which("g++") is not None
    return fused(graph) if fuses else graph


def _exported(function: Function, arrays: Sequence[mx.array], roles: Sequence[str] | None) -> Graph:
    reader = _Reader(list(roles or [""] * len(arrays)))
    try:
        mx.export_function(reader, function, *arrays)
    except ValueError as error:
        if "[export_function]" not in str(error):
            raise
        raise UnsupportedError(
            f"The training step holds an operation that cannot be read: {error}"
        ) from error
    return reader.graph


class _Reader:
    """Builds a graph of the records that ``mx.export_function`` calls it with, one by one.

    A file of a whole step's records would be large.

    Args:
        roles: of the function's inputs.
    """

    def __init__(self, roles: list[str]) -> None:
        self.graph = Graph()
        self._roles = roles
        self._ids: dict[str, int] = {}  # by the name that an array has in the records

    def __call__(self, record: dict[str, Any]) -> None:
        kind = record["type"]
        if kind == "inputs":
            pairs = zip(record["inputs"], self._roles, strict=True)
            self.graph.inputs = [self._id(*item, role=role) for item, role in pairs]
        elif kind == "outputs":
            self.graph.outputs = [self._id(*item) for item in record["outputs"]]
        elif kind == "constants":
            for name, array in record["constants"]:
                self._id(name, array.shape, array.dtype, "constant")
        elif kind == "primitive":
            self._operation(record)

    def _operation(self, record: dict[str, Any]) -> None:
        name = record["name"]
        arguments = tuple(record["arguments"])
        if name != "Transpose":  # its axes are needed, others are only compared
            arguments = tuple(map(str, arguments))
        inputs = tuple(self._id(*item) for item in record["inputs"])
        outputs = tuple(self._id(*item) for item in record["outputs"])
        self.graph.nodes.append(Node(name, inputs, outputs, arguments))

    def _id(self, name: str, shape: Sequence[int], dtype: mx.Dtype, role: str = "") -> int:
        if name not in self._ids:
            self._ids[name] = self.graph.add(Array(tuple(shape), dtype.size, role))
        return self._ids[name]


# --- functions with custom gradients --------------------------------------------------------------


def _with_calls(graph: Graph, calls: Sequence[Call]) -> Graph:
    """Put the functions with custom gradients that were met into the graph."""
    if not calls:
        return graph
    known: dict[Hashable, Halves] = {}
    return handwritten(graph, [_halves(call, known) for call in calls])


def _halves(call: Call, known: dict[Hashable, Halves]) -> Halves:
    """Read both halves of a function with a custom gradient; those of equal calls once."""
    form = _form([call.forward, call.backward, call.differentiable, call.others, call.output])
    if form not in known:
        known[form] = _read_halves(call)
    return known[form]


def _read_halves(call: Call) -> Halves:
    """Read them for lazy arrays of the shapes and dtypes of the call."""
    differentiable = [mx.zeros(*like) for like in call.differentiable]
    others = [mx.zeros(*like) for like in call.others]
    slope = mx.zeros(*call.output)

    def forward(*arrays: mx.array) -> list[mx.array]:
        return [call.forward(*arrays)]

    def backward(*arrays: mx.array) -> list[mx.array]:
        return list(call.backward(*arrays))

    return Halves(
        read(forward, [*differentiable, *others]),
        read(backward, [slope, *differentiable, *others]),
        len(differentiable),
    )


def _form(value: Any) -> Hashable:
    """Something equal for values that make the same graph.

    Of a function, its code and the forms of what it encloses; of an array, its shape and dtype.
    """
    if isinstance(value, mx.array):
        return value.shape, str(value.dtype)
    if isinstance(value, nn.Module):
        return Functional(value).form
    if isinstance(value, (list, tuple)):
        return tuple(map(_form, value))
    if isinstance(value, MethodType):
        return _form(value.__func__), _form(value.__self__)
    if isinstance(value, FunctionType):
        enclosed = tuple(_form(cell.cell_contents) for cell in value.__closure__ or ())
        return value.__code__, _form(value.__defaults__), enclosed
    return hashable(value)


# --- operations that cannot be read ---------------------------------------------------------------


def _attend(q: mx.array, k: mx.array, v: mx.array, **_: object) -> mx.array:
    """Linear attention, which stands in for fused attention.

    It keeps queries, keys and values, makes an array for the output and one for each gradient, and
    like the fused one none of the length squared.

    Args:
        q: ``(batch, heads, length, width)``.
        k: ``(batch, groups, length, width)``.
        v: ``(batch, groups, length, width of values)``.
    """
    shape = q.shape
    groups = k.shape[1]
    # (batch, groups, heads of a group, length, width)
    q = q.reshape(shape[0], groups, -1, *shape[2:])
    # (batch, groups, 1, width, width of values)
    products = (k.swapaxes(-1, -2) @ v)[:, :, None]
    return (q @ products).reshape(*shape[:-1], v.shape[-1])


def _entropy(logits: mx.array, *_: object) -> mx.array:
    """The logarithm of a sum, which keeps the logits and makes one array of their size."""
    return mx.logsumexp(logits, -1)


def _routed(x: mx.array, weights: mx.array, indices: mx.array, sorted_indices: bool) -> mx.array:
    """One matrix made of all experts, which keeps the rows.

    Its gradient by the weights has their size, once.

    Args:
        x: ``(…, 1, in)``.
        weights: ``(experts, out, in)``.
        indices: ``(…)``, the expert of every row.
        sorted_indices: whether they ascend; only then is the operation one that cannot be read.
    """
    if sorted_indices:
        return x @ mx.square(weights).sum(0).T
    return mx.gather_mm(x, weights.swapaxes(-1, -2), rhs_indices=indices)


class _StandIn(NamedTuple):
    """A function that takes the place of another while a graph is read.

    Attributes:
        module: that holds the other.
        name: of the other.
        function: needs the same arrays.
    """

    module: Any
    name: str
    function: Callable[..., mx.array]


_STAND_INS = {
    # CUDA's
    "ScaledDotProductAttention": _StandIn(mx.fast, "scaled_dot_product_attention", _attend),
    # CUDA's
    "CrossEntropy": _StandIn(mx.fast, "cross_entropy", _entropy),
    # the gradient by the factors of experts
    "SegmentedMM": _StandIn(low_rank, "routed", _routed),
}
"""By the operation that cannot be read."""


@contextmanager
def _stand_ins(operations: Iterable[str]) -> Iterator[None]:
    """Let functions stand in for those whose operations cannot be read."""
    with ExitStack() as stack:
        for operation in operations:
            module, name, function = _STAND_INS[operation]
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, function)
        yield
