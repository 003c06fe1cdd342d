"""A run under all that a restless user does at once loses nothing, keeps nothing, and leaves the process clean."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

from tests.soak import CONFIG, RATES

ADAPTERS = (
    4 * 3_600
)  # bytes of a few copies of the adapter: one more or less is alive while a run stands between two steps
FIRST_USE = (
    160_000_000  # bytes that libraries, threads and a first look at other storages take once
)
GROWTH = 16_000_000  # bytes: 500 steps of history, and what the allocator scatters


@pytest.fixture(scope="module")
def soaked():
    """What ``tests/soak.py`` found, and its process."""
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-m", "tests.soak"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    return json.loads(lines[0]), lines[1:]


def test_every_step_is_made_once_and_told_in_order(soaked):
    found, _ = soaked
    assert found["steps"] == list(range(CONFIG.iters + 1))
    assert found["faults"] == [] and found["shown"] == {
        "status": "done",
        "steps": CONFIG.iters,
        "error": "",
    }
    assert found["answered"] == found["asked"]


def test_the_curve_is_that_of_an_undisturbed_run_with_the_same_rates_bit_for_bit(soaked):
    disturbed, plain = soaked[0]["curves"]
    assert disturbed == plain
    assert {rate for rate in soaked[0]["rates"] if not math.isnan(rate)} == set(RATES)


def test_memory_at_the_end_is_that_after_ten_steps(soaked):
    early, half, late = (soaked[0][when] for when in ("early", "half", "late"))
    assert abs(late["active"] - early["active"]) <= ADAPTERS
    assert late["rss"] - early["rss"] < FIRST_USE and late["rss"] - half < GROWTH


def test_no_thread_is_left(soaked):
    found, left = soaked
    assert found["threads"] == ["MainThread", "qlab-mlx"]
    assert left == ["left: ['MainThread']"]
