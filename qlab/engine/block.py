"""A part of a model as a function of its arrays, and what a step must know of a block. Computes nothing."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qlab.engine.linear import Packed
from qlab.engine.loss import Arrays

_NUMBERS = ("layer_idx", "layer_id", "layer_number")  # attributes that only say where a block stands, as a rule


class Piece:
    """A part of a model as a function of its arrays.

    Args:
        root: a module, or a list.
        without: a list within that is no part of it.

    Attributes:
        places: path, holder and key of every array.
        form: everything else about it; two pieces of one form compute the same from the same arrays.
        numbered: whether an attribute that says where it stands was left out of the form.
    """

    def __init__(self, root: Any, without: Any = None) -> None:
        self.root, self.places, self.numbered = root, [], False
        self.form = self._look(root, "", without)

    @property
    def arrays(self) -> list[mx.array]:
        """The arrays that it has now."""
        return [holder[key] for _, holder, key in self.places]

    @contextmanager
    def having(self, arrays: Sequence[mx.array]) -> Iterator[None]:
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


class Block:
    """One block: where its arrays are, and which of them are trained."""

    def __init__(self, module: nn.Module, path: str, parameters: Arrays) -> None:
        self.piece = Piece(module)
        places = [f"{path}.{name}" for name, *_ in self.piece.places]
        self.chosen = [n for n, name in enumerate(places) if name in parameters]
        self.trained = [places[n] for n in self.chosen]
        self.first = first_back(module, path, self.trained)


def arrays_of(module: nn.Module) -> list[tuple[str, Any, Any]]:
    """Return path, holder and key of every array, in the order in which a block's are handed over and its gradients come."""
    return Piece(module).places


def followers(places: list[tuple[str, Any, Any]], prefix: str, trained: Arrays) -> dict[mx.Dtype, list[str]]:
    """Return which trained arrays of the blocks serve as cast to the dtype of what enters them, by that dtype.

    None do where something else in the blocks would make activations wider on their way.

    Args:
        places: of the arrays of what ``attach`` returned; see ``arrays_of``.
        prefix: of paths within the blocks.
        trained: arrays by path.
    """
    inside = [(path, holder, holder[key]) for path, holder, key in places if path.startswith(prefix)]
    others = (a for path, holder, a in inside if path not in trained and not isinstance(holder, Packed))
    dtypes = {array.dtype for array in others if mx.issubdtype(array.dtype, mx.floating)}
    own = [path for path, holder, _ in inside if path in trained and getattr(holder, "follows", False)]
    return {dtypes.pop(): own} if len(dtypes) == 1 else {}


def first_back(block: nn.Module, path: str, trained: list[str]) -> list[str]:
    """Return those of a block's trained arrays whose gradients are there when half of the way back is done.

    They are those of the part that was put into the block last, and so, as a rule, is the last on the way forward.

    Args:
        block: its parts in order.
        path: of the block.
        trained: paths.
    """
    parts = [own for key in block if (own := [name for name in trained if name.startswith(f"{path}.{key}.")])]
    return parts[-1] if len(parts) > 1 else []


def plain(value: Any) -> Hashable:
    """Something equal for equal values: itself if it can be, otherwise its identity."""
    if isinstance(value, (list, tuple)):
        return tuple(map(plain, value))
    try:
        hash(value)
    except TypeError:
        return id(value)
    return (type(value), value)
