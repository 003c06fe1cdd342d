"""One run from its first start to its end.

The job on the MLX thread, where the run stands, and what it has to say.

Knows no adapter and no panel.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from typing import Any

from qlab.core.config.train import TrainConfig
from qlab.core.progress import Progress
from qlab.core.train.events import StepEvent
from qlab.core.train.report import RunReport, Summary
from qlab.engine.data.batches import Feed
from qlab.engine.train.checkpoint import TrainState
from qlab.engine.train.loop import Task, train_steps
from qlab.errors import BusyError, ConfigError
from qlab.runtime import peaks as record
from qlab.runtime.device import backend
from qlab.runtime.job import Job

# panels are told no more often than this: a browser that draws on the same machine takes its time
# from the run
_TICK_S = 0.2

Made = tuple[Task, TrainState, tuple[str, ...]]


class Session:
    """A run that can be started, held, stopped and started again.

    Args:
        name: of the run.
        config: the run.
        feed: its batches.
        callbacks: called with every ``StepEvent``, on the MLX thread; one that fails is told and
            called no more.
        on_change: called, at most five times a second while the run goes on, whenever there is
            something new to show.

    Attributes:
        config: the run; the learning rate may still change before the first start.
        task: what runs, or None before the first start.
        state: where it stands, or None before.
        phase: what it does now, in a word; empty while nothing runs.
        error: what it failed with, in words, or an empty string.
        reason: why it ended before its last step, or an empty string.
        notes: what to know about it.
        summary: figures of the events so far.

    Raises:
        ConfigError: a callback cannot be called.
    """

    def __init__(
        self,
        name: str,
        config: TrainConfig,
        feed: Feed,
        callbacks: Iterable[Callable[[StepEvent], Any]],
        on_change: Callable[[], None],
    ) -> None:
        self.name = name
        self.config = config
        self.feed = feed
        found = (
            callbacks
            if isinstance(callbacks, Iterable) and not callable(callbacks)
            else (callbacks,)
        )
        self._callbacks = list(found)
        self._on_change = on_change
        if wrong := [callback for callback in self._callbacks if not callable(callback)]:
            raise ConfigError(
                f"callbacks={wrong[0]!r} is not legal; give functions that take a StepEvent."
            )
        self.task: Task | None = None
        self.state: TrainState | None = None
        self.phase = self.error = self.reason = ""
        self.notes: tuple[str, ...] = ()
        self.summary = Summary()
        self._events: list[StepEvent] = []
        self._job: Job | None = None
        self._told = 0.0

    @property
    def status(self) -> str:
        """``idle``, ``running``, ``paused``, ``stopped``, ``done`` or ``failed``."""
        if self._job is None:
            return "idle"
        return "stopped" if self._job.state == "done" and self.reason else self._job.state

    @property
    def active(self) -> bool:
        """Whether it is running or paused."""
        return self._job is not None and self._job.active

    @property
    def events(self) -> tuple[StepEvent, ...]:
        """Every event so far.

        One that a validation may still add to is not among them, so none ever changes.
        """
        return tuple(self._events)

    @property
    def learning_rate(self) -> float:
        """Base rate, before warm-up and schedule; a new one counts from the next step on."""
        if self.task is None or self.state is None:
            return self.config.learning_rate
        return self.task.wanted_rate or self.state.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        wanted = replace(self.config, learning_rate=value)  # refuses what is no rate
        if self.task is None:
            self.config = wanted
        else:
            self.task.wanted_rate = value

    def check_idle(self) -> None:
        """Refuse to start twice, or to start what is done.

        Raises:
            BusyError: says which.
        """
        if self.active:
            raise BusyError(f"The run {self.name!r} is {self.status} already.")
        if self.status == "done":
            raise BusyError(
                "All steps are done. A new Trainer on the same adapter goes on from its parameters."
            )

    def start(self, make: Callable[[], Made], on_end: Callable[[], None]) -> None:
        """Run in the background from where it stands.

        Args:
            make: called on the MLX thread at the first start.
            on_end: called on the MLX thread at the end.
        """
        self.error = self.reason = ""

        def ended(job: Job) -> None:
            self.phase = ""
            self._settle()
            if (
                self.task is not None
            ):  # marks of the save at the end: no later step can tell what went wrong
                self.notes += tuple(mark.text for mark in self.task.marks if mark.text != mark.kind)
                self.task.marks.clear()
            if job.error is not None:
                self.error = str(job.error) or type(job.error).__name__
            on_end()
            self._on_change()

        self._job = Job(lambda: self._run(make), self._event, ended).start()

    def pause(self) -> None:
        """Hold after the present step."""
        if self._job is not None:
            self._job.pause()

    def resume(self) -> None:
        """Go on after ``pause``."""
        if self._job is not None:
            self._job.resume()

    def stop(self) -> None:
        """End after the present step, with a checkpoint."""
        if self._job is not None:
            self._job.stop()

    def wait(self) -> None:
        """Wait for the end."""
        if self._job is not None:
            self._job.wait()

    def finish(self, report: RunReport, exact_nbytes: int) -> None:
        """Tell the callbacks that want to know.

        Record the peak, if the run was long enough to have seen its largest batch.

        Args:
            report: of the run, as it ended.
            exact_nbytes: what of the foreseen peak was known to the byte.
        """
        for callback in self._callbacks:
            try:
                if finish := getattr(callback, "finish", None):
                    finish(report)
                if error := getattr(callback, "error", None):
                    self.notes += (str(error),)
            except Exception as error:  # somebody else's
                self.notes += (f"a callback failed at the end: {error!r}",)
        if self.state is not None and self.state.step >= self.feed.per_epoch:
            record.add(backend(), report.predicted_nbytes, exact_nbytes, report.peak_nbytes)

    def _run(self, make: Callable[[], Made]) -> Generator[StepEvent | Progress, None, None]:
        if self.task is None:
            self.phase = "preparing"
            yield Progress("preparing", 0, 1)
            self.task, self.state, self.notes = make()
            self._settle()
        self.phase = "training"
        self.reason = yield from train_steps(self.task, self.state)

    def _event(self, event: StepEvent | Progress) -> None:
        self.phase = event.what if isinstance(event, Progress) else "training"
        if isinstance(event, StepEvent):
            self._settle()
            for callback in list(self._callbacks):
                try:
                    callback(event)
                except Exception as error:  # somebody else's; the run must not end for it
                    self._callbacks.remove(callback)
                    self.notes += (
                        f"a callback failed at step {event.step} and is called no more: {error!r}",
                    )
        if (
            time.monotonic() - self._told > _TICK_S or self.status != "running"
        ):  # a paused run has no later tick to tell it
            self._told = time.monotonic()
            self._on_change()

    def _settle(self) -> None:
        """Take in the events that are complete."""
        for event in self.state.history[len(self._events) :] if self.state is not None else ():
            self.summary.add(event)
            self._events.append(event)
