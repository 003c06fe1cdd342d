"""Modules as functions of their arrays, so that one compiled function serves modules alike.

Used by the blockwise step, which compiles one function for all blocks of a form, and by what reads
its graph.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

# attributes that, as a rule, only say where a block stands
_NUMBERS = ("layer_idx", "layer_id", "layer_number")


ArrayValues = list[mx.array]  # the arrays of a ``Functional``, in the order of its places


class ArrayPlace(NamedTuple):
    """Where a module holds an array.

    Attributes:
        path: of the array, from the root.
        holder: the module, dict or list that holds it.
        key: its name or number there.
    """

    path: str
    holder: Any
    key: str | int


class Functional:
    """A module, or a tree of arguments, as a function of the arrays in it.

    Example:
        >>> function = Functional(nn.Linear(4, 4))
        >>> with function.using([weight, bias]):
        ...     y = function.root(x)

    Args:
        root: a module, a dict or a list.
        without: a list within that is left out.

    Attributes:
        root: as given.
        places: where every array stands, in an order that depends on names only.
        form: everything else about it; two roots of one form compute the same from the same arrays.
        numbered: whether an attribute that says where it stands was left out of the form.
    """

    def __init__(self, root: Any, without: list[Any] | None = None) -> None:
        self.root = root
        self.places: list[ArrayPlace] = []
        self.numbered = False
        self._without = without
        self.form = self._form(root, "")

    @property
    def arrays(self) -> ArrayValues:
        """The arrays that it holds now."""
        return [place.holder[place.key] for place in self.places]

    @contextmanager
    def using(self, arrays: Sequence[mx.array]) -> Iterator[None]:
        """Let it hold other arrays within, in the order of ``places``."""
        before = self.arrays
        self._put(arrays)
        try:
            yield
        finally:
            self._put(before)

    def _put(self, arrays: Sequence[mx.array]) -> None:
        for place, array in zip(self.places, arrays, strict=True):
            place.holder[place.key] = array

    def _form(self, node: Any, path: str) -> Hashable:
        """Note the arrays below a node, and return a value that tells its form from others."""
        if not isinstance(node, (dict, list)):
            return hashable(node)
        form: list[Hashable] = [type(node)]
        items: Iterable[tuple[Any, Any]] = enumerate(node)
        if isinstance(node, dict):
            items = sorted(node.items())
        for key, value in items:
            if isinstance(value, mx.array):
                self.places.append(ArrayPlace(f"{path}{key}", node, key))
                form.append((key, value.shape, str(value.dtype)))
            elif self._without is None or value is not self._without:
                form.append((key, self._form(value, f"{path}{key}.")))
        if isinstance(node, nn.Module):
            form += self._attributes(node)
        return tuple(form)

    def _attributes(self, module: nn.Module) -> list[Hashable]:
        """Attributes of a module that are no parameters, such as a number of heads."""
        form: list[Hashable] = []
        for key, value in sorted(vars(module).items()):
            if key in _NUMBERS:
                self.numbered = True
            elif key != "_no_grad":
                form.append((key, hashable(value)))
        return form


def hashable(value: Any) -> Hashable:
    """Return something that is equal for equal values: by value if it can be, else by identity."""
    if isinstance(value, (list, tuple)):
        return tuple(map(hashable, value))
    try:
        hash(value)
    except TypeError:
        return id(value)
    return (type(value), value)
