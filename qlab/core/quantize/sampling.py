"""Estimates a layer's total error from a sample of it, with the standard error of the estimate.

``engine.quantize.table_filler`` calls it. Pure arithmetic; L layers, n sampled units of each.
"""

from __future__ import annotations

import numpy as np


def ratio_estimate(
    y: np.ndarray, x: np.ndarray, x_total: np.ndarray, population: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Estimate the total of ``y`` from a sample, with a covariate whose total is known.

    The rounding error of a chunk of weights is nearly proportional to its squared ranges, and the
    sum of those is known for the whole layer, so the ratio of the two needs few chunks. Source:
    Cochran, *Sampling Techniques*, 3rd ed., §6.3 (estimator) and eq. 6.13 (variance), for a simple
    random sample without replacement.

    Args:
        y: float64 ``(L, n)``, sampled values.
        x: float64 ``(L, n)``, the covariate of the same units.
        x_total: float64 ``(L,)``, the covariate's total over the population.
        population: ``(L,)``, number of units in the population.

    Returns:
        Total of y ``(L,)`` and its standard error ``(L,)``, both float64. NaN where x is zero
        throughout the sample although y is not.
    """
    n = y.shape[1]
    y_sum = y.sum(1)
    x_sum = x.sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(y_sum == 0, 0.0, y_sum / x_sum)
        residual = y - ratio[:, None] * x
        variance = (residual**2).sum(1) / max(n - 1, 1)
        unsampled = np.clip(1 - n / population, 0, 1)
        # from the sample's total to the population's
        scale = np.where(x_sum == 0, 0.0, x_total / x_sum)
        se = np.sqrt(unsampled * n * variance) * scale
    return ratio * x_total, se


def relative_error(
    error_sq: np.ndarray, error_sq_se: np.ndarray, weight_sq: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return ‖W−Ŵ‖/‖W‖ and its standard error; both are 0 where the weights are.

    The standard error is the first-order one of a square root: σ(√e) = σ(e) / (2√e).

    Args:
        error_sq: ‖W−Ŵ‖², ``(L,)``.
        error_sq_se: its standard error, ``(L,)``.
        weight_sq: ‖W‖², ``(L,)``.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.sqrt(error_sq / weight_sq)
        relative_se = 0.5 * value * error_sq_se / error_sq
        se = np.where(error_sq > 0, relative_se, 0.0)
    is_zero = weight_sq == 0
    return np.where(is_zero, 0.0, value), np.where(is_zero, 0.0, se)


def sqnr_db(relative: np.ndarray | float) -> np.ndarray | float:
    """Return the signal-to-quantization-noise ratio in dB: −20·log10(‖W−Ŵ‖/‖W‖).

    Infinite for no error.
    """
    with np.errstate(divide="ignore"):
        return -20 * np.log10(relative)
