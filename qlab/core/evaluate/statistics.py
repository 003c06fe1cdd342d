"""Means per token and shares of right answers, with their errors and intervals."""

from __future__ import annotations

import math

import numpy as np

_Z = 1.959963984540054  # 95 % of a normal distribution lie within so many standard deviations


Pair = tuple[float, float]


def ratio(sums: np.ndarray, counts: np.ndarray) -> Pair:
    """Return a mean per token and its standard error, rows being the draws.

    The error of a ratio of sums over clusters, linearized: √(R/(R−1)·Σ(s − mean·c)²) / Σc for R
    rows with sums s and counts c (Cochran 1977, Sampling Techniques, section 6.3, without the
    finite population; the clustered error of Miller 2024, arXiv:2411.00640, section 2.2).

    Args:
        sums: by row, ``(R,)``.
        counts: tokens of each row, ``(R,)``.

    Returns:
        Mean and error; the error is NaN for fewer than two rows.
    """
    total = counts.sum()
    if not total:
        return math.nan, math.nan
    mean = float(sums.sum() / total)
    rows = len(counts)
    if rows < 2 or math.isnan(mean):
        return mean, math.nan
    residuals = sums - mean * counts
    squares = np.square(residuals).sum()
    correction = rows / (rows - 1)
    spread = math.sqrt(correction * squares)
    return mean, float(spread / total)


def wilson(score: float, count: int) -> Pair:
    """Return Wilson's 95 % interval of a share.

    Unlike mean ± 2 errors it says something where all answers are right, or none. For scores
    between 0 and 1 it is wide enough. Source: Wilson 1927, J. Am. Stat. Assoc. 22, with p the share
    of n answers and z = 1.96: (p + z²/2n ± z·√(p(1−p)/n + z²/4n²)) / (1 + z²/n).

    Args:
        score: the share, 0 to 1.
        count: answers.
    """
    if not count:
        return math.nan, math.nan
    z_squared = _Z**2
    scale = 1 + z_squared / count
    shifted = score + z_squared / (2 * count)
    middle = shifted / scale
    of_share = score * (1 - score) / count
    variance = of_share + z_squared / (4 * count**2)
    half = _Z * math.sqrt(variance) / scale
    low = max(middle - half, 0.0)
    high = min(middle + half, 1.0)
    return low, high
