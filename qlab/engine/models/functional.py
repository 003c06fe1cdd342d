"""Modules as functions of their arrays."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

_NUMBERS = (
    "layer_idx",
    "layer_id",
    "layer_number",
)  # attributes that only say where a block stands, as a rule


class Functional:
    """A part of a model as a function of its arrays.

    Args:
        root: a module, or a list.
        without: a list within that is no part of it.

    Attributes:
        places: path, holder and key of every array.
        form: everything else about it; two pieces of one form compute the same from the same
            arrays.
        numbered: whether an attribute that says where it stands was left out of the form.
    """

    def __init__(self, root: Any, without: Any = None) -> None:
        self.root = root
        self.places = []
        self.numbered = False
        self.form = self._look(root, "", without)

    @property
    def arrays(self) -> list[mx.array]:
        """The arrays that it has now."""
        return [holder[key] for _, holder, key in self.places]

    @contextmanager
    def using(self, arrays: Sequence[mx.array]) -> Iterator[None]:
        """Give it other arrays within."""
        before = self.arrays
        self._put(arrays)
        try:
            yield
        finally:
            self._put(before)

    def _put(self, arrays: Sequence[mx.array]) -> None:
        for (_, holder, key), array in zip(self.places, arrays, strict=True):
            holder[key] = array

    def _look(self, node: Any, path: str, without: Any) -> Hashable:
        if not isinstance(node, (dict, list)):
            return plain(node)
        found: list[Hashable] = [type(node)]
        for key, value in sorted(node.items()) if isinstance(node, dict) else enumerate(node):
            if isinstance(value, mx.array):
                self.places.append((f"{path}{key}", node, key))
                found.append((key, value.shape, str(value.dtype)))
            elif value is not without or without is None:
                found.append((key, self._look(value, f"{path}{key}.", without)))
        for key, value in sorted(vars(node).items()) if isinstance(node, nn.Module) else ():
            if key in _NUMBERS:
                self.numbered = True
            elif key != "_no_grad":
                found.append((key, plain(value)))
        return tuple(found)


def plain(value: Any) -> Hashable:
    """Something equal for equal values: itself if it can be, otherwise its identity."""
    if isinstance(value, (list, tuple)):
        return tuple(map(plain, value))
    try:
        hash(value)
    except TypeError:
        return id(value)
    return (type(value), value)
