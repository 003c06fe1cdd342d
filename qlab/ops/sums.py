"""Sums of many numbers that stay right in float32. Everything stays lazy.

MLX's CPU adds the numbers of a float32 array one after the other. Next to a large total small
numbers are rounded, and from 2²⁴ on ones are lost: a sum of 16 million squares is 2.8 % low, one of
134 million 36 %. Here sums of short stretches are added, then sums of those: the error of pairwise
summation (Higham, "The accuracy of floating point summation", 1993, section 3) grows with the
length of a stretch, not of the array.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import isqrt

import mlx.core as mx

# Of a row whose exponentials are added. The shorter they are, the larger the array of their sums.
_STRETCHES = range(2048, 15, -1)


def stable_sum(array: mx.array, of: Callable[[mx.array], mx.array] = lambda part: part) -> mx.array:
    """Return the sum of what a function makes of an array's numbers, float32 ``()``.

    Not finite if any of them is not. Arrays of more than a few numbers take the same operations
    whatever their length is, so that a memory formula holds for all lengths.

    Args:
        array: of any shape.
        of: from numbers to numbers, such as ``mx.square``.
    """
    vector = array.reshape(-1)
    stretch = max(1, round(vector.size ** (1 / 3)))
    sums, rest = _sums_of_stretches(vector, stretch, of)
    # n numbers gave n^⅔ sums; their sums are added in stretches as long as there are many
    outer_sums, outer_rest = _sums_of_stretches(sums, max(1, isqrt(sums.size)))
    return outer_sums.sum() + outer_rest + rest


def stable_norm(array: mx.array) -> mx.array:
    """Return the square root of the sum of an array's squares, float32 ``()``."""
    return mx.sqrt(stable_sum(array, mx.square))


def logsumexp(x: mx.array, keepdims: bool = False) -> mx.array:
    """Return the logarithm of the sum of exponentials over the last axis, in the array's dtype.

    Args:
        x: ``(…, n)``. A short row, and one that no stretch parts evenly, is added at once.
        keepdims: whether the last axis stays, of length 1.

    Returns:
        ``(…)`` or ``(…, 1)``.
    """
    stretch = _even_stretch(x.shape[-1])
    if not stretch:
        return mx.logsumexp(x, -1, keepdims=keepdims)
    stretches = x.reshape(*x.shape[:-1], -1, stretch)
    of_stretches = mx.logsumexp(stretches, -1)  # (…, n / stretch)
    return mx.logsumexp(of_stretches, -1, keepdims=keepdims)


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """Return −log of the probability of each target, in nats, float32 ``(…)``.

    Args:
        logits: ``(…, vocabulary)``, of any floating dtype.
        targets: ``(…)``.
    """
    full = logits.astype(mx.float32)
    of_targets = mx.take_along_axis(full, targets[..., None], -1)[..., 0]
    return logsumexp(full) - of_targets


def _sums_of_stretches(
    vector: mx.array, length: int, of: Callable[[mx.array], mx.array] = lambda part: part
) -> tuple[mx.array, mx.array]:
    """Return the sums of a vector's stretches of a length, and the sum of what is left over."""
    # at least two numbers are left over, so that every length takes the same operations
    even = max(vector.size - 2, 0) // length * length
    stretches = vector[:even].reshape(even // length, length)
    rest = vector[even:]
    sums = of(stretches.astype(mx.float32)).sum(1)
    return sums, of(rest.astype(mx.float32)).sum()


@cache
def _even_stretch(length: int) -> int:
    """Return the longest stretch that parts a row evenly; 0 if there is none, or no need."""
    if length in _STRETCHES:
        return 0
    return next((stretch for stretch in _STRETCHES if length % stretch == 0), 0)
