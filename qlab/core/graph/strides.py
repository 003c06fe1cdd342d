"""Strides of arrays in buffers, in elements, as MLX's flags and reshapes see them.

Pure arithmetic for ``buffers``. Follows ``mlx/backend/common/utils.h`` (0.32).
"""

from __future__ import annotations

from math import prod

from qlab.core.graph.graph import Shape

Strides = tuple[int, ...]


def dense_strides(shape: Shape) -> Strides:
    """Return the strides of an array whose rows lie one after the other."""
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def is_dense(shape: Shape, strides: Strides) -> bool:
    """Whether an array's rows lie one after the other (MLX's flag ``row_contiguous``)."""
    dense = dense_strides(shape)
    # the stride of an axis of one element is never used
    return all(
        size == 1 or stride == wanted
        for size, stride, wanted in zip(shape, strides, dense, strict=True)
    )


def gapless_elements(shape: Shape, strides: Strides) -> int:
    """Return how many stored elements an array spans if there are no others between them, else 0.

    In whatever order and however often they are read (MLX's flag ``contiguous``).
    """
    axes = [(stride, size) for size, stride in zip(shape, strides, strict=True)]
    span = 1
    for stride, size in sorted(axes):
        if size == 1 or stride == 0:  # reads nothing further
            continue
        if stride != span:
            return 0
        span *= size
    return span


def regrouped_strides(shape: Shape, strides: Strides, to: Shape) -> Strides | None:
    """Return the strides of a reshape that needs no copy, or None if it needs one.

    Axes that lie one after the other are joined to runs, and each run is cut anew: (4, 3) with
    strides (3, 1) is one run of 12, of which (2, 6) has strides (6, 1). Turned round, with strides
    (1, 4), it is two runs, and (2, 6) would cross their border.

    Args:
        shape: of the array.
        strides: of the array.
        to: the new shape, of as many elements.
    """
    runs = _runs(shape, strides)
    new: list[int] = []
    at = 0
    left, innermost = runs[0]  # elements of the present run that are not cut yet
    for size in to:
        if size == 1:
            new.append(1)
            continue
        if left == 1:
            at += 1
            left, innermost = runs[at]
        if left % size:
            return None
        left //= size
        new.append(left * innermost)
    return tuple(new)


def _runs(shape: Shape, strides: Strides) -> list[tuple[int, int]]:
    """Elements and innermost stride of the runs of axes that lie one after the other."""
    runs: list[tuple[int, int]] = []
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if runs and runs[-1][1] == size * stride:
            elements, _ = runs.pop()
            runs.append((elements * size, stride))
        else:
            runs.append((size, stride))
    return runs or [(1, 1)]
