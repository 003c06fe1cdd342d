"""What happens in a training run, as values: an event per step, and the state that a panel shows.

Knows neither how a step is computed nor how it is drawn.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass
from math import fsum, isfinite, nan
from typing import Any

from qlab.core.train.events import StepEvent


@dataclass(frozen=True)
class RunReport:
    """A run when it has ended, or so far.

    Attributes:
        name: of the run; also of its folder.
        model: name of the model.
        storage: label of the base's storage, such as ``affine 4-bit g64``, or ``16-bit``.
        adapter: such as ``lora r8``.
        status: ``running``, ``paused``, ``stopped``, ``done`` or ``failed``.
        steps: optimizer steps done.
        iters: optimizer steps wanted.
        loss: training loss, mean of the last tenth of the steps, nats per target.
        val_loss: last validation loss, or NaN.
        best_val_loss: lowest validation loss, or NaN.
        best_step: where it was.
        tokens: that passed the model, padding not counted.
        tokens_per_second: over the whole run, median of steps.
        seconds: in steps.
        predicted_nbytes: expected peak before the run.
        peak_nbytes: measured peak.
        path: folder with the checkpoints.
        notes: what to know: how the step was computed, what was skipped, why it ended.
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

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # what a cell shows
        lines = [
            f"{self.name}: {self.storage}, {self.adapter}: {self.status} after {self.steps} of {self.iters} steps"
        ]
        lines += [
            f"loss {self.loss:.4g}"
            + (f", validation {self.val_loss:.4g}" if isfinite(self.val_loss) else "")
        ]
        if isfinite(self.best_val_loss):
            lines[-1] += f", best {self.best_val_loss:.4g} at step {self.best_step}"
        lines += [
            f"{self.tokens:,} tokens in {self.seconds:.1f} s, {self.tokens_per_second:,.0f} tokens/s"
        ]
        lines += [
            f"peak {self.peak_nbytes / 1e9:.3g} GB, foreseen {self.predicted_nbytes / 1e9:.3g} GB",
            self.path,
        ]
        printer.text("\n".join([*lines, *self.notes]))


class Summary:
    """The figures of a ``RunReport`` that follow from a run's events; takes them in one at a time.

    Args:
        history: events to begin with.
    """

    def __init__(self, history: Iterable[StepEvent] = ()) -> None:
        self._losses: list[float] = []  # those that are numbers
        self._rates: list[float] = []  # ascending
        self._steps = 0
        self._tokens = 0
        self._seconds = 0.0
        self._peak = 0
        self._val_loss = nan
        self._best = (nan, 0)
        for event in history:
            self.add(event)

    def add(self, event: StepEvent) -> None:
        """Take in the next event."""
        self._peak = max(self._peak, event.peak_nbytes)
        if event.val_loss is not None and isfinite(event.val_loss):
            self._val_loss = event.val_loss
            if not self._best[0] <= event.val_loss:
                self._best = event.val_loss, event.step
        if event.step > 0:
            self._steps = event.step
            self._tokens = self._tokens + event.tokens
            self._seconds = event.seconds
            insort(self._rates, event.tokens_per_second)
            if isfinite(event.loss):
                self._losses.append(event.loss)

    def fields(self) -> dict[str, Any]:
        """Return the fields of a ``RunReport`` by name."""
        tail = self._losses[-max(len(self._losses) // 10, 1) :]
        return {
            "steps": self._steps,
            "loss": fsum(tail) / len(tail) if tail else nan,
            "val_loss": self._val_loss,
            "best_val_loss": self._best[0],
            "best_step": self._best[1],
            "tokens": self._tokens,
            "tokens_per_second": self._rates[len(self._rates) // 2] if self._rates else nan,
            "seconds": self._seconds,
            "peak_nbytes": self._peak,
        }


def summary(history: Iterable[StepEvent]) -> dict[str, Any]:
    """Return the fields of a ``RunReport`` that follow from its events."""
    return Summary(history).fields()


def seconds_left(history: tuple[StepEvent, ...], iters: int) -> float:
    """Expect the time that the rest takes from the median of the last steps.

    NaN before there is one.
    """
    last = history[-21:]
    recent = [b.seconds - a.seconds for a, b in zip(last, last[1:], strict=False)]
    if not recent:
        return nan
    return sorted(recent)[len(recent) // 2] * (iters - history[-1].step)
