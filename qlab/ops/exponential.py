"""The exponential function out of additions and multiplications, for float32 on a CPU.

MLX's CPU computes exponentials one at a time, in 12 ns each, compiled or not; this takes 2 ns where
it is compiled, and is more exact (docs/log.md). It has no gradient, so it is for functions that
have one of their own: ``ops/swiglu.py`` and ``ops/attention.py``.

e^x = 2^k · e^r, with k the integer next to x / ln 2, and r = x − k·ln 2 between ±ln 2 / 2. A
float32 with the bits (k + 127)·2²³ is 2^k, and e^r is a short series.
"""

from __future__ import annotations

from functools import partial

import mlx.core as mx

_LOG2_E = 1.4426950408889634
# added and taken away again, it rounds a float32 to the nearest integer: above 2²³ float32 numbers
# are integers
_ROUND = 1.5 * 2.0**23
# ln 2 in two parts, so that products of an integer k with the first part are exact (Cody & Waite
# 1980)
_LN2_HIGH = 0.693359375
_LN2_LOW = -2.12194440e-4
_BIT = 2.0**23  # the lowest bit of a float32's exponent
_BIAS = 127  # of a float32's exponent
_MOST = 104.0  # beyond it every exponential is 0 or infinite


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
    """Whether MLX's own exponential is slow for this array."""
    return x.dtype == mx.float32 and mx.default_device() == mx.cpu


def _exp(x: mx.array, less: float | mx.array, sign: int) -> mx.array:
    """Return e to the power of ±(x − less).

    MLX's compiler fuses up to a view, and needs one where bits are read as another type. So k is
    computed twice, in ``_power`` and in ``_rest``, the second time from x as if that were another
    array (``depends``): else k would be written to memory as an array. And the rest, which the
    series reads many times, is made one array by two views that change nothing: else it would be
    computed anew for each time that it is read.
    """
    power = _power(x, less, sign)
    (same_x,) = mx.depends([x], [power])
    rest = _rest(same_x, less, sign).view(mx.int32).view(mx.float32)
    return _product(rest, power.view(mx.float32))


@partial(mx.compile, shapeless=True)
def _power(x: mx.array, less: float | mx.array, sign: int) -> mx.array:
    """Return the bits of 2^k as int32; those of 0 and of infinity beyond the ends.

    All in float32: (k + 127)·2²³ is a multiple of 2²³, so exact. Adding and taking away 1.5·2⁴⁶
    rounds to such a multiple.
    """
    scale = sign * _LOG2_E * _BIT
    rounder = _ROUND * _BIT
    back = (_ROUND - _BIAS) * _BIT  # takes the rounder away again, and adds the bias
    bits = ((x - less) * scale + rounder) - back
    infinity = 255 * _BIT
    bits = mx.minimum(mx.maximum(bits, 0.0), infinity)
    return bits.astype(mx.int32)


@partial(mx.compile, shapeless=True)
def _rest(x: mx.array, less: float | mx.array, sign: int) -> mx.array:
    """Return r, what is left of the exponent once k·ln 2 is taken away."""
    x = mx.maximum(x - less, -_MOST)
    x = mx.minimum(x, _MOST)
    k = (x * _LOG2_E + _ROUND) - _ROUND
    rest = (x - k * _LN2_HIGH) - k * _LN2_LOW
    return rest if sign > 0 else -rest


@partial(mx.compile, shapeless=True)
def _product(rest: mx.array, power: mx.array) -> mx.array:
    """Return e^r · 2^k: the exponential's series up to the sixth power, in pairs.

    Terms are nested in pairs only: MLX does not compile into one what is nested too deeply.
    """
    square = rest * rest
    middle = 1 / 2 + rest * (1 / 6)
    low = (1 + rest) + square * middle
    high = 1 / 24 + rest * (1 / 120) + square * (1 / 720)
    series = low + (square * square) * high
    return series * power
