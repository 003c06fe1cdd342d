"""Reads the graph of a function of arrays without computing it. Runs on the MLX thread.

Knows no model.

``mx.export_function`` is experimental; ``tests/engine/memory/test_read_graph.py`` says what is
relied on.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FunctionType, MethodType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qlab.core.graph.graph import Array, Graph, Node
from qlab.core.graph.handwritten import Halves, handwritten
from qlab.engine.models.functional import Functional, hashable
from qlab.errors import UnsupportedError
from qlab.nn import low_rank
from qlab.ops.custom_gradient import Call, recorded_calls


def read(
    fun: Callable[..., Sequence[mx.array]],
    arrays: Sequence[mx.array],
    roles: Sequence[str] | None = None,
) -> Graph:
    """Return the graph of a function.

    Args:
        fun: of arrays; must return them in one list.
        arrays: what it is given; may be lazy, and stays so.
        roles: what each is for; see ``Array``.

    Raises:
        UnsupportedError: it holds an operation that cannot be read.
    """
    replaced: set[str] = set()
    while True:
        try:
            with _stand_ins(replaced), recorded_calls() as calls:
                graph = _read(fun, arrays, roles)
            known: dict[Hashable, Halves] = {}
            return handwritten(graph, [_halves(call, known) for call in calls]) if calls else graph
        except UnsupportedError as error:
            found = {name for name in _STAND_INS if name in str(error)} - replaced
            if not found:
                raise
            replaced |= found


def _halves(call: Call, known: dict[Hashable, Halves]) -> Halves:
    """Read both halves of a function with a gradient of its own.

    Those of calls that are alike are read once.
    """
    look = _form([call.forward, call.backward, call.differentiable, call.others, call.output])
    if look not in known:
        known[look] = _read_halves(call)
    return known[look]


def _form(value: Any) -> Hashable:
    """Something equal for values that make the same graph.

    Of a function, its code and the forms of what it has enclosed.
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
        return (
            value.__code__,
            _form(value.__defaults__),
            tuple(_form(cell.cell_contents) for cell in value.__closure__ or ()),
        )
    return hashable(value)


def _read_halves(call: Call) -> Halves:
    """Read them for arrays that look like those of the call."""
    given, closed, (made,) = (
        [mx.zeros(*look) for look in looks]
        for looks in (call.differentiable, call.others, [call.output])
    )
    forward = read(lambda *arrays: [call.forward(*arrays)], [*given, *closed])
    return Halves(
        forward,
        read(lambda *arrays: list(call.backward(*arrays)), [made, *given, *closed]),
        len(given),
    )


def _read(
    fun: Callable[..., Sequence[mx.array]], arrays: Sequence[mx.array], roles: Sequence[str] | None
) -> Graph:
    reader = _Reader(list(roles or [""] * len(arrays)))
    try:
        mx.export_function(reader, fun, *arrays)
    except ValueError as error:
        if "[export_function]" not in str(error):
            raise
        raise UnsupportedError(
            f"The training step holds an operation that cannot be read: {error}"
        ) from error
    return reader.graph


def _attend(q: mx.array, k: mx.array, v: mx.array, **_: object) -> mx.array:
    """Linear attention keeps queries, keys and values, and makes an array for the output and one
    for each gradient.

    Like the fused one it makes none of the length squared.
    """
    shape = q.shape
    groups = k.shape[1]
    q = q.reshape(shape[0], groups, -1, *shape[2:])
    return (q @ (k.swapaxes(-1, -2) @ v)[:, :, None]).reshape(*shape[:-1], v.shape[-1])


def _entropy(logits: mx.array, *_: object) -> mx.array:
    """The logarithm of a sum keeps the logits and makes one array of their size."""
    return mx.logsumexp(logits, -1)


def _routed(x: mx.array, weights: mx.array, indices: mx.array, sorted_indices: bool) -> mx.array:
    """One matrix made of all experts keeps the rows, and makes one gradient of the size of the
    weights.
    """
    if sorted_indices:
        return x @ mx.square(weights).sum(0).T
    return mx.gather_mm(x, weights.swapaxes(-1, -2), rhs_indices=indices)


# functions that need the same arrays as those whose operation cannot be read, by the operation
_STAND_INS: dict[str, list[tuple[Any, str, Callable[..., mx.array]]]] = {
    "ScaledDotProductAttention": [(mx.fast, "scaled_dot_product_attention", _attend)],  # CUDA's
    "CrossEntropy": [(mx.fast, "cross_entropy", _entropy)],  # CUDA's
    "SegmentedMM": [(low_rank, "routed", _routed)],  # the gradient by the factors of experts
}


@contextmanager
def _stand_ins(names: Iterable[str]) -> Iterator[None]:
    """Let other functions take the place of some whose operations cannot be read."""
    with ExitStack() as stack:
        for module, name, function in (stand_in for key in names for stand_in in _STAND_INS[key]):
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, function)
        yield


class _Reader:
    """Takes what MLX says of a function, record by record: a whole step's records would be large."""

    def __init__(self, roles: list[str]) -> None:
        self.graph = Graph()
        self._roles = roles
        self._ids: dict[str, int] = {}

    def __call__(self, record: dict[str, Any]) -> None:
        kind = record["type"]
        if kind == "inputs":
            self.graph.inputs = [
                self._note(*item, role)
                for item, role in zip(record["inputs"], self._roles, strict=True)
            ]
        elif kind == "outputs":
            self.graph.outputs = [self._note(*item) for item in record["outputs"]]
        elif kind == "constants":
            for name, array in record["constants"]:
                self._note(name, array.shape, array.dtype, "constant")
        elif kind == "primitive":
            sides = [
                tuple(self._note(*item) for item in record[side]) for side in ("inputs", "outputs")
            ]
            arguments = (
                tuple(record["arguments"])
                if record["name"] == "Transpose"
                else tuple(map(str, record["arguments"]))
            )
            self.graph.nodes.append(Node(record["name"], *sides, arguments))

    def _note(self, name: str, shape: tuple[int, ...], dtype: mx.Dtype, role: str = "") -> int:
        if name not in self._ids:
            self._ids[name] = self.graph.add(Array(tuple(shape), dtype.size, role))
        return self._ids[name]
