"""How much of a layer's quantization error each rank recovers, and how much noise alone would give.

``engine/adapt/recovery.py`` measures it, the adapter's report and panel show it. Knows no weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

_EVERY = range(1, 17)
_QUARTERS = range(1, 33)  # of an octave above 16
GRID = (*_EVERY, *(round(16 * 2 ** (quarter / 4)) for quarter in _QUARTERS))
"""Ranks at which shares are stored: every one up to 16, then four an octave up to 4096."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Recovery:
    """The error E = W − Ŵ of one layer, and what each rank of ``GRID`` takes away from it.

    NaN above the ranks that were computed. Of a mixture's experts, each with two factors, squares
    are added up: singular values are those of a typical expert.

    Attributes:
        path: of the layer.
        relative_error: ‖E‖/‖W‖.
        singular: float32, singular values of E over ‖E‖, at the ranks of ``GRID``.
        noise: the same of white noise of E's shape (Marchenko–Pastur).
        weight: float32, share of ‖E‖² that the data-free initialization recovers.
        noise_weight: the same if E is white noise.
        output: by name of an initialization, float32, share of the squared error of the layer's
            output that it recovers on held-out text; empty if the layer saw none.
    """

    path: str
    relative_error: float
    singular: np.ndarray
    noise: np.ndarray
    weight: np.ndarray
    noise_weight: np.ndarray
    output: dict[str, np.ndarray] = field(default_factory=dict)

    def share(self, rank: int, init: str = "weight") -> float:
        """Return the share that a rank recovers, between the ranks of ``GRID`` by interpolation.

        NaN if unknown.

        Args:
            rank: 1 or more.
            init: an initialization, measured by the output on held-out text; ``weight`` is the
                data-free one, measured by the weights.
        """
        curve = self.output.get(init)
        if init == "weight":
            curve = self.weight
        if curve is None:
            return float("nan")
        known = np.isfinite(curve)
        if not known.any():
            return float("nan")
        ranks = np.array(GRID)[known]
        share = np.interp(rank, ranks, curve[known])
        return float(share)


def on_grid(values: np.ndarray) -> np.ndarray:
    """Return the values at the ranks of ``GRID``, float32, NaN where there is none.

    Args:
        values: by rank; the first is that of rank 1.
    """
    ranks = np.array(GRID)
    known = ranks <= len(values)
    places = ranks[known] - 1
    at_ranks = np.full(len(GRID), np.nan, np.float32)
    at_ranks[known] = values[places]
    return at_ranks


@lru_cache(maxsize=64)
def noise_squares(rows: int, columns: int) -> np.ndarray:
    """Return the squared singular values that white noise of a shape is expected to have.

    Descending, their sum is 1.

    Quantiles of the law of Marchenko and Pastur (1967): with β = rows/columns ≤ 1, the eigenvalues
    x of the sample covariance have density √((b−x)(x−a)) / (2πβx) on [a, b] = [(1−√β)², (1+√β)²].
    """
    few, many = sorted((rows, columns))
    beta = few / many
    low = (1 - beta**0.5) ** 2
    high = (1 + beta**0.5) ** 2
    # x = low + (high − low)·sin²θ takes the roots out of the density
    theta = np.linspace(0, np.pi / 2, 4001)[1:]
    sine = np.sin(theta)
    x = low + (high - low) * sine**2
    density = (sine * np.cos(theta)) ** 2 / x
    areas = (density[1:] + density[:-1]) / 2  # trapezoids
    sums = np.cumsum(areas)
    below = np.concatenate([[0], sums])
    middles = (np.arange(few) + 0.5) / few
    eigenvalues = np.interp(middles, below / below[-1], x)
    descending = eigenvalues[::-1]
    return descending / descending.sum()
