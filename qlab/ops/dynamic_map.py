"""The dynamic maps of 8-bit numbers: 256 values over seven decades, finer where they are larger.

Pure numpy.

Source: Dettmers et al. 2022 (arXiv:2110.02861, section 2.1), with the values of bitsandbytes'
``create_dynamic_map``, bit for bit. Knows neither what is stored in such numbers nor where.
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
    found = [np.float32(0), np.float32(1)]
    for i in range(_DECADES):
        middle = _middles(2 ** (i if signed else i + 1)) * np.float32(10.0 ** (i + 1 - _DECADES))
        found += [*middle, *(-middle if signed else ())]
    return np.sort(np.array(found, np.float32))


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
    borders = (values[1:] + values[:-1]) / np.float32(2)
    number = np.arange(1 << 16, dtype=np.uint32) << 16
    ends = np.stack([number.view(np.float32), (number | 0xFFFF).view(np.float32)])
    ends = np.nan_to_num(ends, nan=0.0)  # buckets of what is no number: any code will do
    base = np.searchsorted(borders, ends.min(0))
    return base.astype(np.uint8), np.append(borders, np.float32(np.inf))[base]


def _middles(count: int) -> np.ndarray:
    """Middles of ``count`` equal parts of 0.1…1, float32, as they follow from ``torch.linspace``.

    From both ends.
    """
    k = np.arange(count + 1)
    step = np.float64(np.float32(0.9) / np.float32(count))
    rising = np.float64(np.float32(0.1)) + step * k
    falling = 1 - step * (count - k)
    ends = np.where(k < (count + 1) // 2, rising, falling).astype(np.float32)
    return (ends[1:] + ends[:-1]) / np.float32(2)
