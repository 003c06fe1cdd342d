"""One pass over a weight: its sums against numpy, in one block of rows and in many."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from qlab.core.config.spec import LayerSpec
from qlab.engine.quantize import moments as module
from qlab.engine.quantize.moments import moments
from qlab.engine.quantize.moments import weighted_ranges
from qlab.errors import WeightsError
from tests.tiny import on_mlx

LAYER = LayerSpec(path="head", kind="linear", shape=(6, 192))
WEIGHT = np.random.default_rng(0).standard_normal((6, 192)).astype(np.float32)


def squared_ranges(group: int) -> np.ndarray:
    return np.ptp(WEIGHT.reshape(6, -1, group), axis=-1) ** 2


@pytest.mark.parametrize("block", [192, 1 << 24])
def test_sums_are_those_of_numpy(block, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_WEIGHTS", block)
    found = on_mlx(lambda: moments(LAYER, mx.array(WEIGHT)))()
    exact = WEIGHT.astype(np.float64)
    assert found.sum_sq == pytest.approx((exact**2).sum(), rel=1e-5)
    assert found.amax == np.abs(WEIGHT).max()
    kurtosis = ((exact - exact.mean()) ** 4).mean() / exact.var() ** 2
    assert found.kurtosis == pytest.approx(kurtosis, rel=1e-4)
    assert set(found.squared_ranges) == {32, 64}
    for group, total in found.squared_ranges.items():
        assert total == pytest.approx(group * squared_ranges(group).sum(), rel=1e-5)


def test_weighted_ranges_count_each_weight_by_its_importance():
    rng = np.random.default_rng(1)
    r = rng.random(6).astype(np.float32)
    c = rng.random(192).astype(np.float32)
    found = on_mlx(lambda: weighted_ranges(mx.array(WEIGHT), [(r, c)]))()
    for group, total in found.items():
        each = np.repeat(squared_ranges(group), group, axis=1)
        assert total == pytest.approx((each * np.outer(r, c)).sum(), rel=1e-4)


def test_a_weight_that_is_no_number_is_refused_by_the_name_of_its_layer():
    with pytest.raises(WeightsError, match="'head' holds NaN"):
        on_mlx(lambda: moments(LAYER, mx.array(WEIGHT) * mx.nan))()


def test_sums_of_a_large_layer_are_those_of_float64():
    shape = (1 << 15, 640)  # more than one block; added one by one the squares would be 3 % low
    weight = np.random.default_rng(0).standard_normal(shape, np.float32)
    layer = LayerSpec(path="embed", kind="embedding", shape=shape)
    found = on_mlx(lambda: moments(layer, mx.array(weight)))()
    exact = weight.astype(np.float64)
    assert found.sum_sq == pytest.approx(np.square(exact).sum(), rel=1e-6)
    kurtosis = ((exact - exact.mean()) ** 4).mean() / exact.var() ** 2
    assert found.kurtosis == pytest.approx(kurtosis, rel=1e-5)
    ranges = np.ptp(exact.reshape(-1, 64), axis=-1)
    assert found.squared_ranges[64] == pytest.approx(64 * np.square(ranges).sum(), rel=1e-6)
