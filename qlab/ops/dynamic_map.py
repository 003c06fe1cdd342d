"""The dynamic maps of 8-bit numbers: 256 values over seven decades, finer where they are larger.

Pure numpy, because the values must not depend on a device. Used for the moments of 8-bit Adam and
the scales of nf4.

Source: Dettmers et al. 2022 (arXiv:2110.02861, section 2.1), with the values of bitsandbytes'
``create_dynamic_map``, bit for bit.
"""

from __future__ import annotations

from functools import cache

import numpy as np

_DECADES = 7


@cache
def dynamic_map(signed: bool) -> np.ndarray:
    """Return the values of the codes, float32 ``(256,)``, rising.

    Decade i of 0…6 has 2^i fractions of 10^(i−6) (signed, on each side of zero) or 2^(i+1)
    (unsigned); then 0 and 1. The signed map has 0 at code 127 and ends at −0.993 below; the
    unsigned one has 0 at code 0.
    """
    values = [np.float32(0), np.float32(1)]
    for decade in range(_DECADES):
        count = 2 ** (decade if signed else decade + 1)
        scale = np.float32(10.0 ** (decade + 1 - _DECADES))
        fractions = _middles(count) * scale
        values.extend(fractions)
        if signed:
            values.extend(-fractions)
    return np.sort(np.array(values, np.float32))


@cache
def search_table(signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return what finds the code of a number with two look-ups, whatever the number.

    The upper 16 bits of a float32 are the number of a bucket; a bucket holds at most one border
    between two codes, so the code is ``base[bucket] + (x > edge[bucket])``. Borders lie half-way; a
    number on one belongs to the lower code.

    Returns:
        ``base`` uint8 and ``edge`` float32, ``(65536,)`` each.
    """
    values = dynamic_map(signed)
    borders = (values[1:] + values[:-1]) / np.float32(2)  # (255,)
    bits = np.arange(1 << 16, dtype=np.uint32) << 16
    # the numbers of least and of greatest magnitude in each bucket, (65536,)
    least = bits.view(np.float32)
    greatest = (bits | 0xFFFF).view(np.float32)
    ends = np.stack([least, greatest])
    ends = np.nan_to_num(ends, nan=0.0)  # buckets of what is no number: any code will do
    base = np.searchsorted(borders, ends.min(0))
    upper_borders = np.append(borders, np.float32(np.inf))  # (256,)
    edge = upper_borders[base]
    return base.astype(np.uint8), edge


def _middles(count: int) -> np.ndarray:
    """Return the middles of ``count`` equal parts of 0.1…1, float32 ``(count,)``.

    As they follow from ``torch.linspace``, which computes the lower half of the ends from below and
    the upper half from above.
    """
    k = np.arange(count + 1)
    step = np.float64(np.float32(0.9) / np.float32(count))
    start = np.float64(np.float32(0.1))
    from_below = start + step * k
    from_above = 1 - step * (count - k)
    lower_half = k < (count + 1) // 2
    ends = np.where(lower_half, from_below, from_above)
    ends = ends.astype(np.float32)
    return (ends[1:] + ends[:-1]) / np.float32(2)
