"""Reporters with stand-ins for the trackers: what is sent, when a run ends, and that no failure reaches the training."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import pytest

import qlab
from qlab.core.train.events import Mark
from qlab.core.train.report import RunReport
from qlab.core.train.events import StepEvent
from qlab.engine.train import reporters
from qlab.errors import ConfigError

REPORT = RunReport(
    name="run",
    model="demo",
    storage="affine 4-bit g64",
    adapter="lora r8",
    status="done",
    steps=2,
    iters=2,
    loss=2.1,
    val_loss=2.2,
    best_val_loss=2.2,
    best_step=2,
    tokens=90,
    tokens_per_second=10.0,
    seconds=1.0,
    predicted_nbytes=1,
    peak_nbytes=2,
    path="p",
    notes=("note",),
)


def event(step: int, **changes) -> StepEvent:
    facts = {
        "epoch": 0.1,
        "loss": 2.0,
        "learning_rate": 1e-4,
        "grad_norm": 1.0,
        "targets": 5,
        "tokens": 9,
        "padded": 9,
        "seconds": 1.0,
        "tokens_per_second": 9.0,
        "active_nbytes": 1,
        "peak_nbytes": 2,
    }
    return StepEvent(step=step, **{**facts, **changes})


class Run:
    """A tracker's run that notes what it is told."""

    def __init__(self, fails_at: str = "", summary: bool = True) -> None:
        self.logged, self.finished, self._fails_at = [], 0, fails_at
        if summary:
            self.summary: dict = {}

    def log(self, values: dict, step: int) -> None:
        if self._fails_at == "log":
            raise RuntimeError("no network")
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1
        if self._fails_at == "finish":
            raise OSError("disk full")


@pytest.fixture(params=["wandb", "trackio"])
def tracker(request, monkeypatch):
    """A module of that name whose ``init`` gives a run, and the settings that it was given."""
    made = SimpleNamespace(settings={}, run=Run(), factory=getattr(reporters, request.param))
    module = SimpleNamespace(init=lambda **settings: made.settings.update(settings) or made.run)
    monkeypatch.setitem(sys.modules, request.param, module)
    return made


def test_a_run_begins_when_the_reporter_is_made_and_is_told_every_event(tracker):
    report = tracker.factory("demo", name="first")
    assert tracker.settings == {"project": "demo", "name": "first"}
    report(event(1))
    report(event(2, val_loss=2.5, marks=(Mark("best", "best so far"),)))
    (_, first), (step, second) = tracker.run.logged
    assert (
        step == 2
        and second["val_loss"] == 2.5
        and second["marks"] == "best so far"
        and second["loss"] == 2.0
    )
    assert "val_loss" not in first and "marks" not in first and "step" not in first


def test_what_is_no_number_is_left_out(tracker):
    tracker.factory("demo")(event(0, loss=math.nan, grad_norm=math.inf, val_loss=3.0))
    ((step, values),) = tracker.run.logged
    assert (
        step == 0
        and "loss" not in values
        and "grad_norm" not in values
        and values["val_loss"] == 3.0
    )


def test_the_end_comes_once_with_the_figures_of_the_report(tracker):
    report = tracker.factory("demo")
    report.finish(REPORT)
    report.finish(REPORT)
    report(event(3))
    assert tracker.run.finished == 1 and tracker.run.logged == [] and report.error == ""
    assert (
        tracker.run.summary["loss"] == 2.1
        and tracker.run.summary["status"] == "done"
        and "notes" not in tracker.run.summary
    )


def test_a_tracker_without_a_summary_still_ends(tracker):
    run = tracker.run = Run(summary=False)
    report = tracker.factory("demo")
    report.finish(REPORT)
    assert run.finished == 1 and report.error == ""


def test_a_failure_never_reaches_the_training_and_is_told(tracker):
    tracker.run = Run(fails_at="log")
    report = tracker.factory("demo")
    for step in (1, 2):
        report(event(step))
    assert report.error == "RuntimeError: no network"
    report.finish()
    assert report.error == "RuntimeError: no network" and tracker.run.finished == 1


def test_a_failure_at_the_end_is_told_too(tracker):
    tracker.run = Run(fails_at="finish")
    report = tracker.factory("demo")
    report.finish(REPORT)
    report.finish(REPORT)
    assert report.error == "OSError: disk full" and tracker.run.finished == 1


def test_a_tracker_that_cannot_begin_says_so_at_once(monkeypatch):
    def init(**_):
        raise RuntimeError("not logged in")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with pytest.raises(RuntimeError, match="not logged in"):
        reporters.wandb("demo")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_package_is_told_with_what_to_do(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=f"pip install {name}"):
        getattr(reporters, name)("demo")


def test_reporters_are_found_at_the_door():
    assert qlab.reporters is reporters and "reporters" in dir(qlab)
