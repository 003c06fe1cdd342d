"""Ratios and intervals of shares, with their errors."""

from __future__ import annotations

import math

import numpy as np

_Z = 1.959963984540054  # 95 % of a normal distribution lie within so many standard deviations


def ratio(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Return a mean per token and its standard error, rows being the draws.

    The error of a ratio of sums over clusters, linearized (Cochran 1977, Sampling Techniques,
    section 6.3, without the finite population; the clustered error of Miller 2024,
    arXiv:2411.00640, section 2.2).

    Args:
        sums: by row, ``(R,)``.
        counts: tokens of each row, ``(R,)``.

    Returns:
        Mean and error; the error is NaN for fewer than two rows.
    """
    total = counts.sum()
    rows = len(counts)
    mean = float(sums.sum() / total) if total else math.nan
    if rows < 2 or math.isnan(mean):
        return mean, math.nan
    return mean, float(math.sqrt(rows / (rows - 1) * np.square(sums - mean * counts).sum()) / total)


def wilson(score: float, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share (Wilson 1927).

    For scores between 0 and 1 it is wide enough.

    Unlike mean ± 2 errors it says something where all answers are right, or none.
    """
    if not count:
        return math.nan, math.nan
    middle = (score + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = (
        _Z * math.sqrt(score * (1 - score) / count + _Z**2 / (4 * count**2)) / (1 + _Z**2 / count)
    )
    return max(middle - half, 0.0), min(middle + half, 1.0)
