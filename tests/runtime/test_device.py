"""The machine's memory, and what its back end is."""

from __future__ import annotations

from importlib import metadata

from qlab.runtime import device
from qlab.runtime.job import mlx_call


def test_memory_is_positive_and_free_is_part_of_total():
    place = mlx_call(device.machine)
    assert 0 < place.free_nbytes <= place.total_nbytes
    assert "GB" in place.label


def test_the_version_is_that_of_the_package():
    assert mlx_call(device.mlx_version) == metadata.version("mlx")
