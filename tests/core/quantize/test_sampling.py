"""Estimates from samples: exact for a whole population, honest about their error otherwise."""

from __future__ import annotations

import numpy as np
import pytest

from qlab.core.quantize.sampling import ratio_estimate
from qlab.core.quantize.sampling import relative_error
from qlab.core.quantize.sampling import sqnr_db


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
