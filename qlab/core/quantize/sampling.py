"""Estimates a layer's total error from a sample of it, with the standard error of the estimate.

``engine.quantize.table_filler`` calls it. Pure arithmetic; L layers, n sampled units of each.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray
ValueAndError = tuple[Array, Array]


def ratio_estimate(y: Array, x: Array, x_total: Array, population: Array) -> ValueAndError:
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
        ratio = y_sum / x_sum
        ratio = np.where(y_sum == 0, 0.0, ratio)
        residual = y - ratio[:, None] * x
        squares = residual**2
        variance = squares.sum(1) / max(n - 1, 1)
        sampled = n / population
        unsampled = np.clip(1 - sampled, 0, 1)
        sampled_se = np.sqrt(unsampled * n * variance)
        # from the sample's total to the population's
        scale = x_total / x_sum
        scale = np.where(x_sum == 0, 0.0, scale)
        se = sampled_se * scale
    return ratio * x_total, se


def relative_error(error_sq: Array, error_sq_se: Array, weight_sq: Array) -> ValueAndError:
    """Return ‖W−Ŵ‖/‖W‖ and its standard error; both are 0 where the weights are.

    The standard error is the first-order one of a square root: σ(√e) = σ(e) / (2√e).

    Args:
        error_sq: ‖W−Ŵ‖², ``(L,)``.
        error_sq_se: its standard error, ``(L,)``.
        weight_sq: ‖W‖², ``(L,)``.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        squared = error_sq / weight_sq
        value = np.sqrt(squared)
        relative_se = 0.5 * value * error_sq_se / error_sq
        has_error = error_sq > 0
        se = np.where(has_error, relative_se, 0.0)
    is_zero = weight_sq == 0
    value = np.where(is_zero, 0.0, value)
    se = np.where(is_zero, 0.0, se)
    return value, se


def sqnr_db(relative: Array | float) -> Array | float:
    """Return the signal-to-quantization-noise ratio in dB: −20·log10(‖W−Ŵ‖/‖W‖).

    Infinite for no error.
    """
    with np.errstate(divide="ignore"):
        return -20 * np.log10(relative)
