"""``RunReport``: a training run when it has ended, or so far; and the figures of its events.

``Trainer.report`` returns one; the panel, ``qlab.runs()`` and ``qlab.run`` show it.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from math import fsum, isfinite, nan
from typing import Any

from qlab.core.train.events import StepEvent


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """A run when it has ended, or so far.

    Attributes:
        name: name of the run and of its folder.
        model: name of the model.
        storage: label of the base's storage, such as ``affine 4-bit g64``, or ``16-bit``.
        adapter: such as ``lora r8``.
        status: ``running``, ``paused``, ``stopped``, ``done`` or ``failed``.
        steps: optimizer steps done.
        iters: optimizer steps wanted.
        loss: training loss, mean of the last tenth of the steps, nats/token.
        val_loss: last validation loss, or NaN.
        best_val_loss: lowest validation loss, or NaN.
        best_step: step of the lowest validation loss.
        tokens: tokens that passed the model, padding not counted.
        tokens_per_second: median over all steps.
        seconds: time in steps, pauses and validations not counted.
        predicted_nbytes: peak memory as predicted before the run.
        peak_nbytes: measured peak memory.
        path: folder with the checkpoints.
        notes: how the step was computed, what was skipped, why it ended.
    """

    name: str
    model: str
    storage: str
    adapter: str
    status: str
    steps: int
    iters: int
    loss: float
    val_loss: float
    best_val_loss: float
    best_step: int
    tokens: int
    tokens_per_second: float
    seconds: float
    predicted_nbytes: int
    peak_nbytes: int
    path: str
    notes: tuple[str, ...] = ()

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Show the report as the last line of a cell."""
        printer.text("\n".join([*self._lines(), *self.notes]))

    def _lines(self) -> list[str]:
        losses = f"loss {self.loss:.4g}"
        if isfinite(self.val_loss):
            losses += f", validation {self.val_loss:.4g}"
        if isfinite(self.best_val_loss):
            losses += f", best {self.best_val_loss:.4g} at step {self.best_step}"
        peak_gb = self.peak_nbytes / 1e9
        predicted_gb = self.predicted_nbytes / 1e9
        return [
            f"{self.name}: {self.storage}, {self.adapter}: {self.status} after {self.steps} of "
            f"{self.iters} steps",
            losses,
            f"{self.tokens:,} tokens in {self.seconds:.1f} s, {self.tokens_per_second:,.0f} "
            "tokens/s",
            f"peak {peak_gb:.3g} GB, predicted {predicted_gb:.3g} GB",
            self.path,
        ]


class Summary:
    """Figures of a ``RunReport`` that follow from a run's events; takes them in one at a time.

    Example:
        >>> Summary(trainer.events).fields()["best_val_loss"]

    Args:
        history: events to begin with.
    """

    def __init__(self, history: Iterable[StepEvent] = ()) -> None:
        self._losses: list[float] = []  # finite ones, in order
        self._speeds: list[float] = []  # tokens per second, ascending
        self._steps = 0
        self._tokens = 0
        self._seconds = 0.0
        self._peak = 0
        self._val_loss = nan
        self._best_val_loss = nan
        self._best_step = 0
        for event in history:
            self.add(event)

    def add(self, event: StepEvent) -> None:
        """Take in the next event."""
        self._peak = max(self._peak, event.peak_nbytes)
        if event.val_loss is not None and isfinite(event.val_loss):
            self._val_loss = event.val_loss
            if not self._best_val_loss <= event.val_loss:  # true for NaN, too
                self._best_val_loss = event.val_loss
                self._best_step = event.step
        if event.step > 0:
            self._steps = event.step
            self._tokens += event.tokens
            self._seconds = event.seconds
            insort(self._speeds, event.tokens_per_second)
            if isfinite(event.loss):
                self._losses.append(event.loss)

    def fields(self) -> dict[str, Any]:
        """Return the fields of a ``RunReport`` by name."""
        last_tenth = self._losses[-max(len(self._losses) // 10, 1) :]
        middle = len(self._speeds) // 2
        return {
            "steps": self._steps,
            "loss": fsum(last_tenth) / len(last_tenth) if last_tenth else nan,
            "val_loss": self._val_loss,
            "best_val_loss": self._best_val_loss,
            "best_step": self._best_step,
            "tokens": self._tokens,
            "tokens_per_second": self._speeds[middle] if self._speeds else nan,
            "seconds": self._seconds,
            "peak_nbytes": self._peak,
        }


def summary(history: Iterable[StepEvent]) -> dict[str, Any]:
    """Return the fields of a ``RunReport`` that follow from its events."""
    return Summary(history).fields()


def seconds_left(history: tuple[StepEvent, ...], iters: int) -> float:
    """Estimate the time to the end from the median of the last 20 steps; NaN before there is one.

    Args:
        history: events so far.
        iters: optimizer steps in all.
    """
    last = history[-21:]
    durations = [after.seconds - before.seconds for before, after in pairwise(last)]
    if not durations:
        return nan
    median = sorted(durations)[len(durations) // 2]
    return median * (iters - history[-1].step)
