"""The inverse of an estimate: the largest value of a setting that still fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qlab.core.display import size_text
from qlab.core.machine import Machine
from qlab.core.memory.estimate import MemoryEstimate
from qlab.core.memory.setup import SOLVABLE, Setup
from qlab.errors import ConfigError, nearest

# Returns the estimate of another setup of the same model.
Estimator = Callable[[Setup], MemoryEstimate]

_MOST_ROWS = 4096  # largest batch that is looked at
_MOST_TOKENS = 2**17  # longest row, where a model's config names no context


def solve(est: MemoryEstimate, at: Estimator, name: str, machine: Machine) -> int:
    """Return the largest value of a setting whose expected peak is within a budget.

    Found by bisection: the peak never falls while a setting grows.

    Args:
        est: all other settings are its.
        at: estimates other setups.
        name: one of ``SOLVABLE``.
        machine: the budget.

    Raises:
        ConfigError: no such setting, or not even its smallest value fits; says what that needs.
    """
    if name not in SOLVABLE:
        choices = ", ".join(SOLVABLE)
        hint = nearest(name, SOLVABLE)
        raise ConfigError(f"solve has no {name!r}; choose one of {choices}.{hint}")
    legal = _legal_values(est, name)

    def need(index: int) -> int:
        return at(est.setup.with_value(name, legal[index])).total_nbytes

    free = machine.free_nbytes
    least = need(0)
    if least > free:
        have = f"{size_text(free)} are free ({machine.label})"
        raise ConfigError(
            f"Not even {name}={legal[0]} fits: it needs {size_text(least)}, and {have}."
        )
    fits = 0
    too_large = len(legal)
    while too_large - fits > 1:
        middle = (fits + too_large) // 2
        if need(middle) <= free:
            fits = middle
        else:
            too_large = middle
    return legal[fits]


def _legal_values(est: MemoryEstimate, name: str) -> Sequence[int]:
    """Return the legal values of a setting, ascending."""
    if name == "bits":
        return est.setup.default.scheme.bits
    if name == "rank":
        targets = est.setup.adapter.targets(est.spec)
        narrowest = min(min(layer.shape[-2:]) for layer in targets)  # a rank cannot exceed it
        return range(1, 1 + narrowest)
    most = {
        "num_layers": est.blocks,
        "max_seq_length": est.context or _MOST_TOKENS,
        "batch_size": _MOST_ROWS,
    }
    # a row needs two tokens: one to read and one to predict
    least = 2 if name == "max_seq_length" else 1
    return range(least, 1 + most[name])
