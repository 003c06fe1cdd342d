"""The one MLX thread of the process, and jobs that run on it a step at a time.

MLX's streams belong to the thread that made them, so all MLX work of qlab happens on one long-lived
thread; it clears its streams when the process ends (otherwise the interpreter aborts). A job is a
generator: after each event the thread serves whoever else waits, so a long job never blocks a short
call, and a stop takes effect within one step. Knows no model and shows nothing.
"""

from __future__ import annotations

import atexit
import queue
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, TimeoutError
from typing import Any, TypeVar

from qlab.errors import BusyError

T = TypeVar("T")
_TICK_S = 0.1  # panels are told no more often than this
_POLL_S = 0.1  # a blocking wait wakes this often, so that a kernel interrupt is seen


class _MLXThread:
    """Serial executor on one daemon thread, started at first use."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._lock = threading.Lock()

    def submit(self, fn: Callable[[], Any]) -> Future:
        """Queue a call; return its future."""
        future: Future = Future()
        with self._lock:
            if (
                self._closed
            ):  # objects that the interpreter clears away may still ask; nobody would ever answer
                future.set_exception(RuntimeError("The process is ending; MLX is closed."))
                return future
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True, name="qlab-mlx")
                self._thread.start()
                atexit.register(self.close)
            self._queue.put((future, fn))
        return future

    def is_current(self) -> bool:
        """Whether the caller is on the MLX thread."""
        return threading.current_thread() is self._thread

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            future, fn = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(fn())
                except BaseException as error:
                    future.set_exception(error)
            del item, future, fn  # the last call's arrays must not live until the next one
        import mlx.core as mx

        mx.synchronize()
        mx.clear_streams()

    def close(self, timeout_s: float = 60.0) -> None:
        """End the jobs after their present steps, with what they save then, and the thread after
        the calls that are queued.
        """
        until = time.monotonic() + timeout_s
        for job in list(_active):
            job.stop()
        while _active and time.monotonic() < until:
            time.sleep(_POLL_S / 10)
        with self._lock:
            self._closed = True
            self._queue.put(None)
        if self._thread is not None:
            self._thread.join(max(until - time.monotonic(), 1.0))


_active: set[Job] = set()  # jobs that have started and not ended
_thread = _MLXThread()


def wait_for(future: Future) -> Any:
    """Wait for a future in short polls, so that a kernel interrupt is raised here within 0.1 s."""
    while True:
        try:
            return future.result(timeout=_POLL_S)
        except TimeoutError:
            if future.done():
                return future.result()


def finished(work: Generator[Any, None, T]) -> T:
    """Run a generator to its end, here and now; return its result."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def mlx_call(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a function on the MLX thread and wait for its result; arrays in it must be evaluated.

    Safe from the main thread, from widget callbacks and from the MLX thread itself.
    """
    if _thread.is_current():
        return fn(*args, **kwargs)
    return wait_for(_thread.submit(lambda: fn(*args, **kwargs)))


class Job:
    """A generator that runs on the MLX thread, an event at a time.

    Args:
        events: makes the generator (called on the MLX thread); what it returns is the job's result.
        on_event: called on the MLX thread with every event; must be quick.
        on_end: called on the MLX thread once, with the job, when it has ended for whatever reason.

    Attributes:
        events: as given, so that an interrupted job can be made again.
        state: ``idle``, ``running``, ``paused``, ``stopped``, ``done`` or ``failed``.
        error: the exception that ended the job, or None.
    """

    def __init__(
        self,
        events: Callable[[], Generator[Any, None, Any]],
        on_event: Callable[[Any], None] | None = None,
        on_end: Callable[[Job], None] | None = None,
    ) -> None:
        self.events = events
        self._on_event = on_event
        self._on_end = on_end
        self._generator: Generator[Any, None, Any] | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._ended: Future = Future()
        self.state = "idle"
        self.error: BaseException | None = None

    def start(self) -> Job:
        """Queue the job; return at once.

        Raises:
            BusyError: it was started before.
        """
        with self._lock:
            if self.state != "idle":
                raise BusyError(f"This job is {self.state}; a job starts once.")
            self.state = "running"
        _active.add(self)
        _thread.submit(self._step)
        return self

    def stop(self) -> None:
        """Ask the job to end after its current step; it keeps what it has done."""
        self._stop.set()
        with self._lock:
            waiting = self.state
            self.state = "running" if self.state == "paused" else self.state
        if waiting == "idle":
            self._end("stopped")
        elif waiting == "paused":
            _thread.submit(self._step)

    def pause(self) -> None:
        """Hold the job after its current step; ``resume`` goes on."""
        with self._lock:
            if self.state == "running":
                self.state = "paused"

    def resume(self) -> None:
        """Go on after ``pause``."""
        with self._lock:
            if self.state != "paused":
                return
            self.state = "running"
        _thread.submit(self._step)

    @property
    def active(self) -> bool:
        """Whether the job is running or paused."""
        return self.state in ("running", "paused")

    @property
    def stopping(self) -> bool:
        """Whether it has been asked to end."""
        return self._stop.is_set()

    def wait(self) -> Any:
        """Wait for the end; return the generator's result, or None if the job was stopped.

        A kernel interrupt stops the job cleanly and is then raised.

        Raises:
            BaseException: whatever the job failed with.
        """
        if _thread.is_current():
            raise BusyError("A job cannot be waited for on the MLX thread, which runs it.")
        try:
            return wait_for(self._ended)
        except KeyboardInterrupt:
            if not self._ended.done():
                self.stop()
                wait_for(self._ended)
            raise

    def _step(self) -> None:
        with self._lock:
            if self.state != "running":
                return
        try:
            if self._stop.is_set():
                if self._generator is not None:
                    self._generator.close()
                return self._end("stopped")
            if self._generator is None:
                self._generator = self.events()
            event = next(self._generator)
            if self._on_event is not None:
                self._on_event(event)
        except StopIteration as finished:
            return self._end("done", result=finished.value)
        except BaseException as error:
            return self._end("failed", error=error)
        _thread.submit(self._step)

    def _end(self, state: str, result: Any = None, error: BaseException | None = None) -> None:
        self.state = state
        self.error = error
        self._generator = None
        try:
            if self._on_end is not None:
                self._on_end(self)
        finally:
            if error is not None:
                self._ended.set_exception(error)
            else:
                self._ended.set_result(result)
            _active.discard(self)


class Latest:
    """One job at a time for one owner.

    A newer background job stops the older, and a blocking one borrows its place.

    Args:
        on_change: called, at most ten times a second while a job runs, whenever ``progress`` or
            ``error`` has changed.

    Attributes:
        progress: last event of the running background job, or None.
        error: what the last background job failed with, in words, or an empty string.
    """

    def __init__(self, on_change: Callable[[], None]) -> None:
        self._on_change = on_change
        self._job = None
        self._told = 0.0
        self.progress: Any = None
        self.error = ""

    def start(self, events: Callable[[], Generator[Any, None, Any]]) -> None:
        """Run in the background, instead of what runs there now."""
        self.stop()
        self.error = ""
        self._job = Job(events, self._event, self._end).start()

    def run(self, events: Callable[[], Generator[Any, None, Any]]) -> Any:
        """Run and wait for the result.

        What ran in the background is stopped first and started again afterwards.
        """
        interrupted = (
            self._job
            if self._job is not None and self._job.active and not self._job.stopping
            else None
        )
        self.stop()
        try:
            return Job(events, self._event, lambda _: self._end(None)).start().wait()
        finally:
            if interrupted is not None:
                self.start(interrupted.events)

    def stop(self) -> None:
        """Stop the background job after its current step."""
        if self._job is not None:
            self._job.stop()

    def wait(self) -> None:
        """Wait for the background job."""
        if self._job is not None:
            self._job.wait()

    def _event(self, event: Any) -> None:
        self.progress = event
        if time.monotonic() - self._told > _TICK_S:
            self._told = time.monotonic()
            self._on_change()

    def _end(self, job: Job | None) -> None:
        if job is not None and job is not self._job:
            return  # a newer job has taken over the display
        self.progress = None
        if job is not None and job.error is not None:
            self.error = str(job.error) or type(job.error).__name__
        self._on_change()
