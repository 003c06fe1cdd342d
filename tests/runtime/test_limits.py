"""A guard's limit is put back, and a run is told to end before memory is gone."""

from __future__ import annotations

import mlx.core as mx

from qlab.runtime import limits
from qlab.runtime.job import mlx_call
from qlab.runtime.limits import Guard


def memory_limit() -> int:
    before = mx.set_memory_limit(10**9)
    mx.set_memory_limit(before)
    return before


def test_limits_hold_within_and_are_put_back():
    def work():
        before = memory_limit()
        with Guard(123_456_789).limits():
            within = memory_limit()
        return before, within, memory_limit()

    before, within, after = mlx_call(work)
    assert within == 123_456_789 and after == before


def test_all_is_well_below_the_limit():
    assert mlx_call(lambda: Guard(10**15).reason()) == ""


def test_a_limit_that_is_exceeded_is_said():
    def work():
        array = mx.zeros(1000)
        mx.eval(array)
        return Guard(1).reason()

    assert "is the limit" in mlx_call(work)


def test_a_machine_without_memory_is_said(monkeypatch):
    monkeypatch.setattr(limits, "ram", lambda: (10**9, 10**6))
    assert "of this machine's memory are left" in mlx_call(lambda: Guard(10**15).reason())
