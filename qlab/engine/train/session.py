"""One run from its first start to its end: its job on the MLX thread, and where it stands.

``Trainer`` owns a session and steers it. A session knows neither the adapter nor the panel.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import replace

from qlab.core.config.train import TrainConfig
from qlab.core.progress import Progress
from qlab.core.train.events import StepEvent
from qlab.core.train.report import RunReport, Summary
from qlab.engine.data.batches import Feed
from qlab.engine.train.callbacks import Callback, Callbacks
from qlab.engine.train.checkpoint import TrainState
from qlab.engine.train.loop import train_steps
from qlab.engine.train.setup import PreparedRun
from qlab.engine.train.task import Task
from qlab.errors import BusyError
from qlab.runtime import peaks
from qlab.runtime.device import backend
from qlab.runtime.job import Job

# a panel is refreshed no more often than this: a browser that draws on the same machine takes its
# time from the run
_TICK_S = 0.2


class Session:
    """A run that can be started, paused, stopped and started again.

    Args:
        name: name of the run.
        config: config of the run.
        feed: batches of the run.
        callbacks: called with every ``StepEvent``, on the MLX thread; one that fails is noted and
            not called again.
        on_change: called, at most five times a second while the run goes on, whenever there is
            something new to show.

    Attributes:
        config: config of the run; the learning rate may still change before the first start.
        task: what runs, or None before the first start.
        state: where it stands, or None before the first start.
        phase: what it does now, in a word; empty while nothing runs.
        error: what it failed with, in words, or an empty string.
        reason: why it ended before its last step, or an empty string.
        notes: what a user should know about the run, one sentence each.
        summary: figures of the events so far.

    Raises:
        ConfigError: a callback cannot be called.
    """

    def __init__(
        self,
        *,
        name: str,
        config: TrainConfig,
        feed: Feed,
        callbacks: Callback | Iterable[Callback],
        on_change: Callable[[], None],
    ) -> None:
        self.name = name
        self.config = config
        self.feed = feed
        self._callbacks = Callbacks(callbacks)
        self._on_change = on_change
        self.task: Task | None = None
        self.state: TrainState | None = None
        self.phase = ""
        self.error = ""
        self.reason = ""
        self.notes: tuple[str, ...] = ()
        self.summary = Summary()
        self._events: list[StepEvent] = []
        self._job: Job | None = None
        self._last_tick = 0.0

    @property
    def status(self) -> str:
        """``idle``, ``running``, ``paused``, ``stopped``, ``done`` or ``failed``."""
        if self._job is None:
            return "idle"
        if self._job.state == "done" and self.reason:
            return "stopped"
        return self._job.state

    @property
    def active(self) -> bool:
        """Whether it is running or paused."""
        return self._job is not None and self._job.active

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.state.step if self.state is not None else 0

    @property
    def events(self) -> tuple[StepEvent, ...]:
        """Every event so far; none of them ever changes.

        An event that a validation may still add to is not among them.
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
        changed = replace(self.config, learning_rate=value)  # raises if the value is not legal
        if self.task is None:
            self.config = changed
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

    def start(self, prepare: Callable[[], PreparedRun], on_end: Callable[[], None]) -> None:
        """Run in the background from where it stands.

        Args:
            prepare: called on the MLX thread at the first start.
            on_end: called on the MLX thread at the end.
        """
        self.error = ""
        self.reason = ""

        def ended(job: Job) -> None:
            self.phase = ""
            self._take_events()
            self._note_last_marks()
            if job.error is not None:
                self.error = str(job.error) or type(job.error).__name__
            on_end()
            self._on_change()

        self._job = Job(lambda: self._run(prepare), self._on_event, ended).start()

    def pause(self) -> None:
        """Pause after the present step."""
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
        """Hand the report to the callbacks, and record the peak for later predictions.

        The peak counts only if the run was long enough to have seen its largest batch.

        Args:
            report: report of the run, as it ended.
            exact_nbytes: part of the predicted peak that was known to the byte.
        """
        self.notes += self._callbacks.finish(report)
        if self.step and self.step >= self.feed.per_epoch:
            peaks.add(backend(), report.predicted_nbytes, exact_nbytes, report.peak_nbytes)

    def _run(
        self, prepare: Callable[[], PreparedRun]
    ) -> Generator[StepEvent | Progress, None, None]:
        if self.task is None or self.state is None:
            self.phase = "preparing"
            yield Progress("preparing", 0, 1)
            self.task, self.state, self.notes = prepare()
            self._take_events()
        self.phase = "training"
        self.reason = yield from train_steps(self.task, self.state)

    def _on_event(self, event: StepEvent | Progress) -> None:
        if isinstance(event, StepEvent):
            self.phase = "training"
            self._take_events()
            self.notes += self._callbacks.call(event)
        else:
            self.phase = event.what
        now = time.monotonic()
        # a paused run has no later tick that would show its last step
        if now - self._last_tick > _TICK_S or self.status != "running":
            self._last_tick = now
            self._on_change()

    def _take_events(self) -> None:
        """Take in the events that are complete."""
        if self.state is None:
            return
        for event in self.state.history[len(self._events) :]:
            self.summary.add(event)
            self._events.append(event)

    def _note_last_marks(self) -> None:
        """Turn marks of the save at the end into notes: no later event can carry them."""
        if self.task is not None:
            self.notes += tuple(mark.text for mark in self.task.marks if mark.text != mark.kind)
            self.task.marks.clear()
