"""Distances are relative, and what is no number is far from everything."""

from __future__ import annotations

import mlx.core as mx
import pytest

from qlab.engine.models.compare import relative_distance
from tests.tiny import on_mlx


@on_mlx
def test_a_distance_is_relative_and_never_small_without_numbers():
    expected = mx.array([3.0, 4.0])
    assert relative_distance(expected, expected) == 0
    assert relative_distance(expected + mx.array([0.0, 0.5]), expected) == pytest.approx(0.1)
    assert not relative_distance(mx.array([mx.nan, 4.0]), expected) < 1e9
