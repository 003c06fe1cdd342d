"""``RunState``: what the trainer panel shows, as a value."""

from __future__ import annotations

from dataclasses import dataclass

from qlab.core.train.events import SampleGeneration, StepEvent
from qlab.core.train.report import RunReport


@dataclass(frozen=True, eq=False, kw_only=True)
class RunState:
    """One moment of a trainer panel.

    Attributes:
        report: the run so far.
        phase: what it does now: ``training``, ``validating``, ``preparing``, ``generating`` or an
            empty string.
        history: every event so far; the tuple grows, an event never changes.
        seconds_left: expected time to the end, or NaN.
        learning_rate: base rate in force (before schedule and warm-up), or what ``TrainConfig``
            says before the start.
        limit_nbytes: memory at which the guard stops the run.
        active_nbytes: memory of the run now.
        generations: answers of the model at several steps to the same prompts, oldest first.
        data: one line about the rows, such as ``712 rows, 38 held out, 41 k target tokens, 3 %
            padding``.
        error: the last error in words, or an empty string.
        code: the Python that rebuilds this run.
    """

    report: RunReport
    phase: str = ""
    history: tuple[StepEvent, ...] = ()
    seconds_left: float = float("nan")
    learning_rate: float = 0.0
    limit_nbytes: int = 0
    active_nbytes: int = 0
    generations: tuple[SampleGeneration, ...] = ()
    data: str = ""
    error: str = ""
    code: str = ""
