"""An exponential function out of additions and multiplications: as exact as float32 allows, wherever it is asked."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from qlab.ops.exponential import exp
from qlab.ops.exponential import is_slow
from qlab.ops.exponential import sigmoid
from tests.tiny import on_mlx

WAYS = pytest.mark.parametrize(
    "way",
    [lambda f: f, mx.compile, lambda f: mx.compile(lambda x: 1 * f(x) + 0)],
    ids=["", "one", "more"],
)
ENDS = [
    float("-inf"),
    -1e38,
    -1000.0,
    -104.0,
    -90.0,
    0.0,
    -0.0,
    88.4,
    104.0,
    1e38,
    float("inf"),
    float("nan"),
]


pytestmark = pytest.mark.usefixtures("on_cpu")


@WAYS
@on_mlx
def test_it_is_exact_to_three_in_ten_million(way):
    ties = np.arange(-250, 250) * np.log(2) / 2  # where rounding may go either way
    x = np.concatenate(
        [np.linspace(-87.3, 88.3, 300_001), np.random.default_rng(0).uniform(-1, 1, 100_000), ties]
    )
    x = x[np.abs(x) < 87.3].astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    assert np.abs(np.array(way(exp)(mx.array(x))) / exact - 1).max() < 4e-7
    share = 1 / (1 + np.exp(-x.astype(np.float64)))
    assert np.abs(np.array(way(sigmoid)(mx.array(x))) / share - 1).max() < 5e-7


@WAYS
@on_mlx
def test_the_ends_are_nothing_infinity_and_no_number(way):
    found = np.array(way(exp)(mx.array(ENDS)))
    np.testing.assert_array_equal(
        found, [0, 0, 0, 0, 0, 1, 1, np.inf, np.inf, np.inf, np.inf, np.nan]
    )
    found = np.array(way(sigmoid)(mx.array(ENDS)))
    np.testing.assert_array_equal(found, [0, 0, 0, 0, 0, 0.5, 0.5, 1, 1, 1, 1, np.nan])


@on_mlx
def test_numbers_too_small_to_be_normal_are_small():
    x = mx.linspace(-104, -87, 10_001)
    assert np.abs(np.array(exp(x)) - np.exp(np.array(x, np.float64))).max() < 1.2e-38


@pytest.mark.parametrize("shape", [(), (3,), (0, 4), (2, 3, 5)])
@on_mlx
def test_any_shape(shape):
    x = mx.random.normal(shape)
    assert exp(x).shape == sigmoid(x).shape == shape
    assert exp(x.T).shape == x.T.shape


@on_mlx
def test_elsewhere_mlx_is_asked():
    x = mx.array([0.5, -3.0]).astype(mx.float16)
    assert not is_slow(x) and is_slow(x.astype(mx.float32))
    assert mx.array_equal(exp(x), mx.exp(x)) and mx.array_equal(sigmoid(x), mx.sigmoid(x))
