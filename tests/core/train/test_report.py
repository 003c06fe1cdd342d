"""The figures of a run, from its events."""

from __future__ import annotations

import time
from dataclasses import replace
from math import fsum, inf, isfinite, isnan, nan

import pytest

from qlab.core.train.report import Summary
from qlab.core.train.report import seconds_left
from qlab.core.train.report import summary
from tests.views.runs import events


def direct(history) -> dict:
    """The same figures as they are defined."""
    steps = [event for event in history if event.step > 0]
    finite = [event.loss for event in steps if isfinite(event.loss)]
    judged = [
        (event.val_loss, event.step)
        for event in history
        if event.val_loss is not None and isfinite(event.val_loss)
    ]
    tail, rates = (
        finite[-max(len(finite) // 10, 1) :],
        sorted(event.tokens_per_second for event in steps),
    )
    best = min(judged, default=(nan, 0))
    return {
        "steps": steps[-1].step if steps else 0,
        "loss": fsum(tail) / len(tail) if tail else nan,
        "val_loss": judged[-1][0] if judged else nan,
        "best_val_loss": best[0],
        "best_step": best[1],
        "tokens": sum(event.tokens for event in steps),
        "tokens_per_second": rates[len(rates) // 2] if rates else nan,
        "seconds": steps[-1].seconds if steps else 0.0,
        "peak_nbytes": max((event.peak_nbytes for event in history), default=0),
    }


@pytest.mark.parametrize("every", [20, None])
def test_taken_in_one_at_a_time_events_give_the_same_figures_at_every_step(every):
    history, found = events(130, every, skipped=(1, 2, 60)), Summary()
    for n, event in enumerate(history):
        assert repr(found.fields()) == repr(direct(history[:n]))
        found.add(event)
    assert repr(found.fields()) == repr(direct(history)) == repr(summary(history))


def test_the_first_of_two_equal_validations_is_the_best_and_what_is_no_number_is_none():
    first, second, third = events(2, every=1)
    history = (
        replace(first, val_loss=inf),
        replace(second, val_loss=2.0),
        replace(third, val_loss=2.0),
    )
    assert summary(history)["best_step"] == 1 and summary(history)["val_loss"] == 2.0
    assert isnan(summary(history[:1])["best_val_loss"]) and isnan(summary(())["loss"])


def test_the_figures_of_a_long_run_are_there_at_once():
    found, times = Summary(events(10_000)), []
    for event in events(100):
        start = time.perf_counter()
        found.add(event)
        found.fields()
        times.append(time.perf_counter() - start)
    assert sorted(times)[50] < 0.001  # 0.06 ms


def test_the_time_left_follows_the_last_steps():
    assert seconds_left(events(30), 100) == pytest.approx(0.8 * 70)
    assert isnan(seconds_left((), 100)) and isnan(seconds_left(events(0), 100))
