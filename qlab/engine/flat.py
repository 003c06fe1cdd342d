"""Many arrays as few vectors, one for each dtype, in the order of their paths: one operation where there were hundreds.

Knows no optimizer and no model.
"""

from __future__ import annotations

from itertools import accumulate
from math import isqrt, prod
from typing import Any

import mlx.core as mx

from qlab.engine.loss import Arrays


class Layout:
    """Where in the vectors each array lies. Sorted by path: another order of layers must not read a file otherwise.

    Args:
        arrays: by path; their shapes and dtypes count.

    Attributes:
        dtypes: of the vectors, by name.
        paths: of the arrays, sorted.
    """

    def __init__(self, arrays: Arrays) -> None:
        self.dtypes: dict[str, mx.Dtype] = {}
        self.paths = sorted(arrays)
        self._places: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
        for path in self.paths:
            name = str(arrays[path].dtype).rpartition(".")[2]
            self.dtypes[name] = arrays[path].dtype
            self._places.setdefault(name, []).append((path, arrays[path].shape))
        self._ends = {n: list(accumulate(prod(s) for _, s in places))[:-1] for n, places in self._places.items()}

    def vectors(self, arrays: Arrays) -> Arrays:
        """Return the arrays joined, in their own dtype; nothing is copied of what was handed out as views of vectors."""
        if isinstance(arrays, Joined) and arrays.layout is self:
            return arrays.vectors
        return {
            name: mx.concatenate([arrays[path].reshape(-1) for path, _ in places]) for name, places in self._places.items()
        }

    def views(self, vectors: Arrays) -> Arrays:
        """Return the arrays by path that vectors are made of, in the vectors' dtype; nothing is copied."""
        found = {}
        for name, places in self._places.items():
            parts = mx.split(vectors[name], self._ends[name])
            found |= {path: part.reshape(shape) for (path, shape), part in zip(places, parts, strict=True)}
        return found


class Joined(dict[str, mx.array]):
    """Arrays by path that are views of vectors; read-only, so that both always say the same.

    Args:
        views: of the vectors.
        layout: of the vectors.
        vectors: by name of their dtype.
    """

    def __init__(self, views: Arrays, layout: Layout, vectors: Arrays) -> None:
        super().__init__(views)
        self.layout, self.vectors = layout, vectors

    def _fixed(self, *_: Any, **__: Any) -> Any:
        raise TypeError("These arrays are views of one vector: make a dict of them and change that.")

    __setitem__ = __delitem__ = __ior__ = update = setdefault = pop = popitem = clear = _fixed


def cast(arrays: Arrays, dtype: mx.Dtype) -> Arrays:
    """Return arrays by path in another dtype, at once where they are views of vectors."""
    if isinstance(arrays, Joined):
        return arrays.layout.views({name: vector.astype(dtype) for name, vector in arrays.vectors.items()})
    return {path: array.astype(dtype) for path, array in arrays.items()}


def total(vector: mx.array) -> mx.array:
    """Sum of all numbers of a vector, float32; not finite if any number is not.

    In two stages: MLX's CPU adds one by one, and 2²⁵ ones or more are 2²⁵ then, since a sum in float32 no longer grows.
    """
    full = vector.astype(mx.float32)
    rows = max(isqrt(full.size - 1), 1)
    even = (full.size - 1) // rows * rows  # never all: every length takes the same operations
    return full[:even].reshape(rows, even // rows).sum(1).sum() + full[even:].sum()
