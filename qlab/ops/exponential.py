"""The exponential function out of additions and multiplications, where MLX's own is slow.

In float32 on a CPU.

MLX's CPU computes one at a time, in 12 ns, compiled or not; this takes 2 ns where it is compiled,
and is more exact. It has no gradient: for functions that have one of their own. Knows no model.
"""

from __future__ import annotations

from functools import partial

import mlx.core as mx

_LOG2_E = 1.4426950408889634
_ROUND = 1.5 * 2.0**23  # added and taken away again, it rounds a float32 to the nearest integer
_LN2 = (
    0.693359375,
    -2.12194440e-4,
)  # ln 2 in two parts, products of the first being exact (Cody & Waite 1980)
_BIT = 2.0**23  # the lowest bit of a float32's exponent
_MOST = 104.0  # beyond it everything is 0 or infinite


def exp(x: mx.array, less: float | mx.array = 0.0) -> mx.array:
    """Return e to the power of x − less.

    Args:
        x: of any shape. In float32 on a CPU what is beyond 88.3 gives infinity, and what is below
            −87.7 gives 0.
        less: is taken away from x first, without making an array of the difference.
    """
    return _exp(x, less, 1) if is_slow(x) else mx.exp(x - less)


def sigmoid(x: mx.array) -> mx.array:
    """Return 1 / (1 + e to the power of −x)."""
    return 1 / (1 + _exp(x, 0.0, -1)) if is_slow(x) else mx.sigmoid(x)


def is_slow(x: mx.array) -> bool:
    """Whether MLX's own is slow for this array."""
    return x.dtype == mx.float32 and mx.default_device() == mx.cpu


def _exp(x: mx.array, less: float | mx.array, sign: int) -> mx.array:
    """Return e to the power of ±(x − less), as 2 to the power of an integer k times e to the power
    of the rest.

    Compilation ends at a view. So k is computed twice, the second time from x as if that were
    another array, or it would be an array of its own; and the rest, which is read many times, is
    made one by two views of nothing.
    """
    power = _power(x, less, sign)
    rest = _rest(mx.depends([x], [power])[0], less, sign)
    return _product(rest.view(mx.int32).view(mx.float32), power.view(mx.float32))


@partial(mx.compile, shapeless=True)
def _power(x: mx.array, less: float | mx.array, sign: int) -> mx.array:
    """The bits of 2 to the power of k, 0 and infinity beyond the ends."""
    bits = ((x - less) * (sign * _LOG2_E * _BIT) + _ROUND * _BIT) - (_ROUND - 127) * _BIT
    return mx.minimum(mx.maximum(bits, 0.0), 255 * _BIT).astype(mx.int32)


@partial(mx.compile, shapeless=True)
def _rest(x: mx.array, less: float | mx.array, sign: int) -> mx.array:
    x = mx.minimum(mx.maximum(x - less, -_MOST), _MOST)
    k = (x * _LOG2_E + _ROUND) - _ROUND
    rest = (x - k * _LN2[0]) - k * _LN2[1]
    return rest if sign > 0 else -rest


@partial(mx.compile, shapeless=True)
def _product(rest: mx.array, power: mx.array) -> mx.array:
    """The exponential's series up to the sixth power, in pairs.

    What is nested too deeply is not compiled into one.
    """
    square = rest * rest
    low = (1 + rest) + square * (1 / 2 + rest * (1 / 6))
    return (low + (square * square) * (1 / 24 + rest * (1 / 120) + square * (1 / 720))) * power
