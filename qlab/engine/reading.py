"""Reads the graph of a function of arrays without computing it. Runs on the MLX thread. Knows no model.

``mx.export_function`` is experimental; ``tests/engine/test_reading.py`` says what is relied on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qlab.core.graph import Array, Graph, Node
from qlab.errors import UnsupportedError


def read(fun: Callable[..., Sequence[mx.array]], arrays: Sequence[mx.array], roles: Sequence[str] | None = None) -> Graph:
    """Return the graph of a function.

    Args:
        fun: of arrays; must return them in one list.
        arrays: what it is given; may be lazy, and stays so.
        roles: what each is for; see ``Array``.

    Raises:
        UnsupportedError: it holds an operation that cannot be read.
    """
    try:
        return _read(fun, arrays, roles)
    except UnsupportedError as error:
        if not any(name in str(error) for name in ("ScaledDotProductAttention", "CrossEntropy")):
            raise
    with _stand_ins():
        return _read(fun, arrays, roles)


def _read(fun: Callable[..., Sequence[mx.array]], arrays: Sequence[mx.array], roles: Sequence[str] | None) -> Graph:
    reader = _Reader(list(roles or [""] * len(arrays)))
    try:
        mx.export_function(reader, fun, *arrays)
    except ValueError as error:
        if "[export_function]" not in str(error):
            raise
        raise UnsupportedError(f"The training step holds an operation that cannot be read: {error}") from error
    return reader.graph


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Let other functions that need the same arrays take the place of fused ones (CUDA), which cannot be read.

    Linear attention keeps queries, keys and values, and makes an array for the output and one for each gradient; like the
    fused one it makes none of the length squared. The logarithm of a sum keeps the logits and makes one array of their size.
    """

    def attend(q: mx.array, k: mx.array, v: mx.array, **_: object) -> mx.array:
        shape, groups = q.shape, k.shape[1]
        q = q.reshape(shape[0], groups, -1, *shape[2:])
        return (q @ (k.swapaxes(-1, -2) @ v)[:, :, None]).reshape(*shape[:-1], v.shape[-1])

    def entropy(logits: mx.array, *_: object) -> mx.array:
        return mx.logsumexp(logits, -1)

    fused = mx.fast.scaled_dot_product_attention, nn.losses.cross_entropy
    mx.fast.scaled_dot_product_attention, nn.losses.cross_entropy = attend, entropy
    try:
        yield
    finally:
        mx.fast.scaled_dot_product_attention, nn.losses.cross_entropy = fused


class _Reader:
    """Takes what MLX says of a function, record by record: a whole step's records would be large."""

    def __init__(self, roles: list[str]) -> None:
        self.graph, self._roles = Graph(), roles
        self._ids: dict[str, int] = {}

    def __call__(self, record: dict[str, Any]) -> None:
        kind = record["type"]
        if kind == "inputs":
            self.graph.inputs = [self._note(*item, role) for item, role in zip(record["inputs"], self._roles, strict=True)]
        elif kind == "outputs":
            self.graph.outputs = [self._note(*item) for item in record["outputs"]]
        elif kind == "constants":
            for name, array in record["constants"]:
                self._note(name, array.shape, array.dtype, "constant")
        elif kind == "primitive":
            sides = [tuple(self._note(*item) for item in record[side]) for side in ("inputs", "outputs")]
            arguments = tuple(record["arguments"]) if record["name"] == "Transpose" else ()
            self.graph.nodes.append(Node(record["name"], *sides, arguments))

    def _note(self, name: str, shape: tuple[int, ...], dtype: mx.Dtype, role: str = "") -> int:
        if name not in self._ids:
            self._ids[name] = self.graph.add(Array(tuple(shape), dtype.size, role))
        return self._ids[name]
