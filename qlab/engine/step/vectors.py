"""Many arrays as few vectors, one for each dtype: one operation where there were hundreds.

An adapter is hundreds of small arrays; the update (``engine/train/update.py``) computes on them as
vectors, and hands them out by path as views of these.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import accumulate
from math import prod
from typing import Any, NoReturn

import mlx.core as mx

from qlab.engine.step.protocol import Arrays

_Place = tuple[str, tuple[int, ...]]  # path and shape of an array


class FlatLayout:
    """Where in the vectors each array lies.

    It does not depend on the order in which a model lists its arrays. Those whose size a large
    power of two divides come first, then by path: so each begins at a multiple of whatever power of
    two divides its rows, as a GPU's products need for their fast loads.

    Example:
        >>> layout = FlatLayout(arrays)
        >>> layout.views(layout.vectors(arrays)).keys() == arrays.keys()
        True

    Args:
        arrays: by path; only their shapes and dtypes count.

    Attributes:
        dtypes: of the vectors, by name, such as ``float32``.
        paths: of the arrays, in their order.
    """

    def __init__(self, arrays: Arrays) -> None:
        self.dtypes: dict[str, mx.Dtype] = {}

        def order(path: str) -> tuple[int, str]:
            return -_power_of_two(arrays[path].size), path

        self.paths = sorted(arrays, key=order)
        self._places: dict[str, list[_Place]] = {}
        for path in self.paths:
            array = arrays[path]
            name = str(array.dtype).rpartition(".")[2]
            self.dtypes[name] = array.dtype
            self._places.setdefault(name, []).append((path, array.shape))
        self._ends: dict[str, list[int]] = {}  # where each array ends but for the last
        for name, places in self._places.items():
            sizes = (prod(shape) for _, shape in places)
            self._ends[name] = list(accumulate(sizes))[:-1]

    def vectors(self, arrays: Arrays) -> Arrays:
        """Return the arrays joined, by name of their dtype.

        Nothing is copied of what is joined already, or was handed out as views.
        """
        if isinstance(arrays, FlatViews) and arrays.layout is self:
            return arrays.vectors
        if arrays.keys() == self.dtypes.keys():
            return arrays
        vectors = {}
        for name, places in self._places.items():
            flat = [arrays[path].reshape(-1) for path, _ in places]
            vectors[name] = mx.concatenate(flat)
        return vectors

    def views(self, vectors: Arrays) -> Arrays:
        """Return the arrays by path that vectors are made of, in the vectors' dtype, not copied."""
        views = {}
        for name, places in self._places.items():
            parts = mx.split(vectors[name], self._ends[name])
            for (path, shape), part in zip(places, parts, strict=True):
                views[path] = part.reshape(shape)
        return views


def _power_of_two(size: int) -> int:
    """Return the largest power of two that divides a size."""
    return size & -size


class FlatViews(dict[str, mx.array]):
    """Arrays by path that are views of vectors; read-only, so that both always say the same.

    A dict, because ``mx.eval`` passes over any other mapping without evaluating it, and MLX's
    compile and tree functions take no other.

    Args:
        views: of the vectors, by path.
        layout: of the vectors.
        vectors: by name of their dtype.
    """

    def __init__(self, views: Arrays, layout: FlatLayout, vectors: Arrays) -> None:
        super().__init__(views)
        self.layout = layout
        self.vectors = vectors

    def __setitem__(self, *_: Any) -> NoReturn:
        _refuse()

    def __delitem__(self, *_: Any) -> NoReturn:
        _refuse()

    def __ior__(self, *_: Any) -> NoReturn:
        _refuse()

    def update(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse."""
        _refuse()

    def setdefault(self, *_: Any) -> NoReturn:
        """Refuse."""
        _refuse()

    def pop(self, *_: Any) -> NoReturn:
        """Refuse."""
        _refuse()

    def popitem(self) -> NoReturn:
        """Refuse."""
        _refuse()

    def clear(self) -> NoReturn:
        """Refuse."""
        _refuse()


def _refuse() -> NoReturn:
    raise TypeError("These arrays are views of one vector: make a dict of them and change that.")


def cast(arrays: Arrays, dtype: mx.Dtype, paths: Collection[str]) -> Arrays:
    """Return some of the arrays in another dtype.

    Where they are views of vectors, the vectors are cast: one operation instead of one for each.

    Args:
        arrays: by path.
        dtype: to cast to.
        paths: of the arrays wanted.
    """
    if paths and isinstance(arrays, FlatViews):
        vectors = {name: vector.astype(dtype) for name, vector in arrays.vectors.items()}
        arrays = arrays.layout.views(vectors)
    return {path: arrays[path].astype(dtype) for path in paths}
