"""Pure arithmetic: estimators, allocation, the Pareto front, configs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from qlab.core.quantize.allocate import allocate
from qlab.core.quantize.compare import compare
from qlab.core.config.quant import QuantConfig
from qlab.core.config.quant import QuantPlan
from qlab.core.quantize.sampling import ratio_estimate
from qlab.core.quantize.sampling import relative_error
from qlab.core.quantize.sampling import sqnr_db
from qlab.core.config.spec import LayerSpec
from qlab.core.config.spec import ModelSpec
from qlab.core.quantize.table import ErrorTable
from qlab.errors import ConfigError


def test_ratio_estimate_is_exact_for_a_whole_population_and_covers_the_truth_otherwise():
    rng = np.random.default_rng(0)
    x = rng.lognormal(0, 1, 4000)
    y = 0.3 * x * rng.uniform(0.5, 1.5, 4000)
    total, se = ratio_estimate(y[None], x[None], np.array([x.sum()]), np.array([4000]))
    assert total[0] == pytest.approx(y.sum()) and se[0] == 0
    z = []
    for _ in range(300):
        drawn = rng.permutation(4000)[:200]
        total, se = ratio_estimate(
            y[None, drawn], x[None, drawn], np.array([x.sum()]), np.array([4000])
        )
        z.append((total[0] - y.sum()) / se[0])
    assert np.std(z) == pytest.approx(1, abs=0.15) and abs(np.mean(z)) < 0.2


def test_layer_of_zeros_has_no_error():
    value, se = relative_error(np.array([0.0]), np.array([0.0]), np.array([0.0]))
    assert value[0] == 0 and se[0] == 0
    assert sqnr_db(0.1) == pytest.approx(20)


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


def test_plan_drops_an_override_that_equals_the_default_and_is_a_value():
    plan = QuantPlan(QuantConfig("affine", 4, 64), {"a": QuantConfig("affine", 8, 64)})
    assert plan.with_override("a", plan.default) == QuantPlan(plan.default)
    assert hash(plan) == hash(eval(repr(plan))) and eval(repr(plan)) == plan
    assert plan.config_for("b") == plan.default


def test_front_holds_what_nothing_beats():
    layers = tuple(LayerSpec(f"l.{i}.w", "linear", (128, 128), nbytes=32768) for i in range(3))
    configs = (
        QuantConfig("affine", 4, 64),
        QuantConfig("affine", 5, 64),
        QuantConfig("symmetric", 5, 64),
    )
    table = ErrorTable.empty(layers, configs)
    for row, error in enumerate((0.1, 0.05, 0.06)):
        table.values[0, row] = error
    report = compare(ModelSpec("m", layers), table)
    assert [p.config for p in report.front] == [configs[0], configs[1]]
    assert {p.config: p.dominated_by for p in report.points}[configs[2]] == "affine 5-bit g64"
