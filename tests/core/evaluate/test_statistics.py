"""Means over rows with their errors, and intervals of shares."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qlab.core.evaluate.statistics import ratio
from qlab.core.evaluate.statistics import wilson


def test_rows_of_one_token_give_the_usual_error_of_a_mean():
    values = np.random.default_rng(2).normal(size=50)
    assert ratio(values, np.ones(50)) == pytest.approx(
        (values.mean(), values.std(ddof=1) / math.sqrt(50))
    )


def test_one_row_has_no_error_and_none_has_no_mean():
    assert ratio(np.array([3.0]), np.array([2.0]))[0] == 1.5
    assert math.isnan(ratio(np.array([3.0]), np.array([2.0]))[1])
    assert math.isnan(ratio(np.array([]), np.array([]))[0])


@pytest.mark.parametrize(
    "right, low, high", [(0, 0.0, 0.2775), (5, 0.2366, 0.7634), (10, 0.7225, 1.0)]
)
def test_wilson_has_an_interval_where_all_or_none_is_right(right, low, high):
    # the figures for ten draws, as in R's prop.test(..., correct = FALSE)
    assert wilson(right / 10, 10) == pytest.approx((low, high), abs=1e-4)
