"""Many arrays as few vectors, one for each dtype: one operation where there were hundreds.

Knows no optimizer and no model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from itertools import accumulate
from math import isqrt, prod
from typing import Any

import mlx.core as mx

from qlab.engine.step.protocol import Arrays


class FlatLayout:
    """Where in the vectors each array lies.

    It does not depend on the order in which a model lists them.

    Those whose size a large power of two divides come first, then by path. So each begins at a
    multiple of whatever power of two divides its rows, as a GPU's products count on.

    Args:
        arrays: by path; their shapes and dtypes count.

    Attributes:
        dtypes: of the vectors, by name.
        paths: of the arrays, in their order.
    """

    def __init__(self, arrays: Arrays) -> None:
        self.dtypes: dict[str, mx.Dtype] = {}
        self.paths = sorted(
            arrays, key=lambda path: (-(arrays[path].size & -arrays[path].size), path)
        )
        self._places: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
        for path in self.paths:
            name = str(arrays[path].dtype).rpartition(".")[2]
            self.dtypes[name] = arrays[path].dtype
            self._places.setdefault(name, []).append((path, arrays[path].shape))
        self._ends = {
            n: list(accumulate(prod(s) for _, s in places))[:-1]
            for n, places in self._places.items()
        }

    def vectors(self, arrays: Arrays) -> Arrays:
        """Return the arrays joined, in their own dtype.

        Nothing is copied of what is joined, or was handed out as views.
        """
        if isinstance(arrays, FlatViews) and arrays.layout is self:
            return arrays.vectors
        if arrays.keys() == self.dtypes.keys():
            return arrays
        return {
            name: mx.concatenate([arrays[path].reshape(-1) for path, _ in places])
            for name, places in self._places.items()
        }

    def views(self, vectors: Arrays) -> Arrays:
        """Return the arrays by path that vectors are made of, in the vectors' dtype.

        Nothing is copied.
        """
        found = {}
        for name, places in self._places.items():
            parts = mx.split(vectors[name], self._ends[name])
            found |= {
                path: part.reshape(shape) for (path, shape), part in zip(places, parts, strict=True)
            }
        return found


class FlatViews(dict[str, mx.array]):
    """Arrays by path that are views of vectors; read-only, so that both always say the same.

    Args:
        views: of the vectors.
        layout: of the vectors.
        vectors: by name of their dtype.
    """

    def __init__(self, views: Arrays, layout: FlatLayout, vectors: Arrays) -> None:
        super().__init__(views)
        self.layout = layout
        self.vectors = vectors

    def _fixed(self, *_: Any, **__: Any) -> Any:
        raise TypeError(
            "These arrays are views of one vector: make a dict of them and change that."
        )

    __setitem__ = __delitem__ = __ior__ = update = setdefault = pop = popitem = clear = _fixed


def cast(arrays: Arrays, dtype: mx.Dtype, paths: Collection[str]) -> Arrays:
    """Return some of the arrays in another dtype.

    Where they are views of vectors, the vectors are cast.
    """
    if paths and isinstance(arrays, FlatViews):
        arrays = arrays.layout.views(
            {name: vector.astype(dtype) for name, vector in arrays.vectors.items()}
        )
    return {path: arrays[path].astype(dtype) for path in paths}


def stable_sum(
    vector: mx.array, of: Callable[[mx.array], mx.array] = lambda part: part
) -> mx.array:
    """Sum of what a function makes of all numbers of a vector, in float32.

    Not finite if any of them is not.

    In two stages: MLX's CPU adds one by one, and 2²⁵ ones or more are 2²⁵ then, since a sum in
    float32 no longer grows.
    """
    rows = isqrt(vector.size)
    even = (
        max(vector.size - 2, 0) // rows * rows
    )  # more than one are left, so that every length takes the same operations
    most = vector[:even].reshape(rows, even // rows)
    rest = vector[even:]
    return of(most.astype(mx.float32)).sum(1).sum() + of(rest.astype(mx.float32)).sum()
