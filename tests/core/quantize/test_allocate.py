"""Allocation: near the best of all, within the budget, and clear about what it refuses."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from qlab.core.quantize.allocate import allocate
from qlab.errors import ConfigError


def test_allocation_is_near_the_best_of_all_and_within_the_budget():
    rng = np.random.default_rng(1)
    for _ in range(20):
        nbytes = np.sort(rng.integers(1, 50, (4, 6)), axis=0).astype(float)
        cost = np.sort(rng.lognormal(0, 2, (4, 6)), axis=0)[::-1]
        budget = rng.uniform(nbytes[0].sum(), nbytes[-1].sum())
        option = allocate(cost, nbytes, 8, budget)
        columns = np.arange(6)
        assert nbytes[option, columns].sum() <= budget
        best = min(
            cost[list(o), columns].sum()
            for o in itertools.product(range(4), repeat=6)
            if nbytes[list(o), columns].sum() <= budget
        )
        largest_step = (cost[:-1] - cost[1:]).max()
        assert cost[option, columns].sum() <= best + largest_step


def test_allocation_leaves_out_what_is_not_known_and_refuses_the_impossible():
    cost = np.array([[1.0, np.nan], [0.5, 0.1]])
    nbytes = np.array([[1.0, 1.0], [2.0, 2.0]])
    assert list(allocate(cost, nbytes, 8, 3)) == [0, 1]
    with pytest.raises(ConfigError, match="below the smallest"):
        allocate(cost, nbytes, 8, 2)
    for wrong in ("4", None, True, float("nan"), 0):
        with pytest.raises(ConfigError, match="bits_per_weight=.* is not legal"):
            allocate(cost, nbytes, 8, wrong)
