"""Chooses bits per layer under a budget: the least total cost whose bytes fit. Pure arithmetic."""

from __future__ import annotations

import math

import numpy as np

from qlab.core.config.legal import check_number
from qlab.core.config.quant import QuantConfig
from qlab.core.config.spec import ModelSpec
from qlab.core.quantize.table import ErrorTable
from qlab.errors import ConfigError

# Weight error ‖W−Ŵ‖/‖W‖ up to which a predicted ΔKL is trusted. The prediction is of second order
# in the change of the weights; where they move by half their norm it means nothing.
RELIABLE_ERROR = 0.5
# Nats a byte between which the price of a byte is searched.
_LEAST_PRICE = 1e-30
_HIGHEST_PRICE = 1e30


def allocate(
    cost: np.ndarray, nbytes: np.ndarray, weights: int, bits_per_weight: float
) -> np.ndarray:
    """Pick one option per layer: the least sum of costs whose bytes are within the budget.

    Lagrangian relaxation (each layer takes its least cost + λ·bytes, λ by bisection), then what is
    left of the budget is spent on the best remaining exchanges. Optimal on the convex hull, within
    one exchange of it elsewhere (Everett, *Operations Research* 11(3), 1963).

    Args:
        cost: float ``(S, L)``, cost of each option for each layer; NaN or inf where there is none.
        nbytes: float ``(S, L)``, its bytes.
        weights: of all layers together.
        bits_per_weight: the budget, over all of them.

    Returns:
        int ``(L,)``, the option of each layer.

    Raises:
        ConfigError: the budget is no number, or even the smallest options do not fit; the message
            gives the smallest budget.
    """
    check_budget(bits_per_weight)
    budget_nbytes = bits_per_weight * weights / 8
    cost = np.where(np.isfinite(cost), cost, np.inf).astype(np.float64)
    possible_nbytes = np.where(np.isfinite(cost), nbytes, np.inf)
    smallest = possible_nbytes.min(0).sum()
    if smallest > budget_nbytes:
        raise ConfigError(
            f"bits_per_weight={bits_per_weight!r} is below the smallest storage of these layers, "
            f"{8 * smallest / weights:.3f}."
        )
    price = _cheapest_price_within(cost, nbytes, budget_nbytes)
    if price is None:  # equal costs: size alone decides
        return possible_nbytes.argmin(0)
    return _spend(cost, nbytes, _options_at(price, cost, nbytes), budget_nbytes)


def check_budget(bits_per_weight: float) -> None:
    """Refuse a budget that is no number above 0; infinity is one.

    Raises:
        ConfigError: says what is legal.
    """
    if bits_per_weight != math.inf:
        check_number("bits_per_weight", bits_per_weight, "a number above 0", lambda x: x > 0)


def _options_at(price: float, cost: np.ndarray, nbytes: np.ndarray) -> np.ndarray:
    """Return the option of each layer with the least cost + price · bytes, ``(L,)``."""
    return (cost + price * nbytes).argmin(0)


def _cheapest_price_within(
    cost: np.ndarray, nbytes: np.ndarray, budget_nbytes: float
) -> float | None:
    """Find, by bisection, the lowest price of a byte at which the options fit the budget."""
    columns = np.arange(cost.shape[1])

    def is_over(price: float) -> bool:
        return bool(nbytes[_options_at(price, cost, nbytes), columns].sum() > budget_nbytes)

    low = 0.0
    high = _LEAST_PRICE
    while is_over(high):
        high *= 16
        if high > _HIGHEST_PRICE:
            return None
    for _ in range(100):
        # geometric, since the price may be of any magnitude
        middle = np.sqrt(low * high) if low else high / 16
        if is_over(middle):
            low = middle
        else:
            high = middle
        if low == 0 and high < 1e-300:
            break
    return high


def _spend(
    cost: np.ndarray, nbytes: np.ndarray, option: np.ndarray, budget_nbytes: float
) -> np.ndarray:
    """Exchange options, the best gain per byte first, while the budget lasts."""
    columns = np.arange(cost.shape[1])
    while True:
        gain = cost[option, columns] - cost
        growth = nbytes - nbytes[option, columns]
        spare = budget_nbytes - nbytes[option, columns].sum()
        possible = (gain > 0) & (growth <= spare)
        if not possible.any():
            return option
        worth = np.where(possible, gain / np.maximum(growth, 1e-9), -np.inf)
        row, column = np.unravel_index(worth.argmax(), worth.shape)
        option = option.copy()
        option[column] = row


def overrides_within(
    spec: ModelSpec, table: ErrorTable, mode: str, bits_per_weight: float
) -> dict[str, QuantConfig]:
    """Choose the bits of every layer for the least predicted ΔKL within a budget.

    Args:
        spec: the layers.
        table: sizes and predicted ΔKL of every config.
        mode: the scheme whose configs may be chosen.
        bits_per_weight: over all weights of the layers that have a prediction.

    Returns:
        The config of each layer that has a prediction, by path.

    Raises:
        ConfigError: see ``allocate``.
    """
    rows = [row for row, config in enumerate(table.configs) if config.mode == mode]
    cost = table.measure("kl_nats")[rows]  # (S, L), a copy
    reliable = table.measure("relative_error")[rows] < RELIABLE_ERROR
    cost[~reliable] = math.nan
    predicted = (cost >= 0).any(axis=0)
    columns = [int(column) for column in np.flatnonzero(predicted)]
    size = sum(spec.layers[column].size for column in columns)
    nbytes = table.nbytes[rows][:, columns]
    options = allocate(cost[:, columns], nbytes, size, bits_per_weight)
    return {
        spec.layers[column].path: table.configs[rows[option]]
        for column, option in zip(columns, options, strict=True)
    }
