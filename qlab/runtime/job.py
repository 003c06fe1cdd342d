"""The one MLX thread of the process, and jobs that run on it a step at a time.

Everything in qlab that computes goes through ``mlx_call`` (a short call, waited for) or ``Job`` (a
long piece of work, such as a training run). A job is a generator: after each event the thread
serves the next in the queue, so a long job never blocks a short call, and a stop takes effect
within one step. So that the kernel stays free, nothing here runs on the kernel's main thread.

Why one thread, and one that lives as long as the process (measured on mlx 0.32.4, Linux):

- Streams and random state belong to the thread that made them: a lazy array of another thread fails
  with "There is no Stream(cpu, 0) in current thread", and one that two threads evaluate at once is
  a segmentation fault. Evaluated arrays cross freely.
- A thread that used MLX and ends without ``mx.clear_streams()`` made the interpreter abort at its
  exit in 3 to 5 of 8 runs; with it, in none.
- Each thread that used MLX leaves an OS thread behind for ever, so a thread per run would add up.
- MLX releases the GIL in ``mx.eval``: the kernel's main thread stays responsive meanwhile. Only the
  trace of ``mx.compile`` holds it, for 0.3 to 0.5 s per new shape.
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
_TICK_S = 0.1  # panels are redrawn no more often than this
_POLL_S = 0.1  # a blocking wait wakes this often, so that a kernel interrupt is seen
_CLOSE_POLL_S = 0.01
_JOIN_S = 1.0  # what the thread gets at least to clear its streams, however late it is


class _MLXThread:
    """Serial executor on one daemon thread, started at first use.

    A daemon, since the interpreter would otherwise wait for it before it calls ``close``.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._lock = threading.Lock()

    def submit(self, fn: Callable[[], Any]) -> Future:
        """Queue a call; return its future."""
        future: Future = Future()
        with self._lock:
            if self._closed:
                # objects that the interpreter clears away may still ask, and would wait for ever
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
        while True:
            item = self._queue.get()
            if item is None:  # put there by close
                break
            future, fn = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(fn())
                except BaseException as error:  # also KeyboardInterrupt: the caller raises it
                    future.set_exception(error)
            del item, future, fn  # the last call's arrays must not live until the next one
        import mlx.core as mx

        mx.synchronize()
        mx.clear_streams()  # or the interpreter may abort, see above

    def close(self, timeout_s: float = 60.0) -> None:
        """End all jobs after their present steps, then the thread after the calls that are queued.

        Jobs save what they save when they are stopped.
        """
        until = time.monotonic() + timeout_s
        for job in list(_active):
            job.stop()
        while _active and time.monotonic() < until:
            time.sleep(_CLOSE_POLL_S)
        with self._lock:
            self._closed = True
            self._queue.put(None)
        if self._thread is not None:
            self._thread.join(max(until - time.monotonic(), _JOIN_S))


_active: set[Job] = set()  # jobs that have started and not ended
_thread = _MLXThread()


def wait_for(future: Future) -> Any:
    """Wait for a future in short polls, so that a kernel interrupt is raised here within 0.1 s.

    A single wait without a timeout would hold the interrupt back until the work is done.
    """
    while True:
        try:
            return future.result(timeout=_POLL_S)
        except TimeoutError:
            if future.done():  # the work itself raised a TimeoutError
                return future.result()


def run_to_end(work: Generator[Any, None, T]) -> T:
    """Run a generator to its end on this thread; return its result."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def mlx_call(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a function on the MLX thread and wait for its result.

    Arrays that come in or go out must be evaluated. Safe from the main thread, from widget
    callbacks and from the MLX thread itself.

    Example:
        >>> mlx_call(lambda: mx.ones(3).sum().item())
        3.0
    """
    if _thread.is_current():
        return fn(*args, **kwargs)
    return wait_for(_thread.submit(lambda: fn(*args, **kwargs)))


class Job:
    """A generator that runs on the MLX thread, one event after another, with short calls between.

    Example:
        >>> job = Job(lambda: iter_steps(model), on_event=show).start()
        >>> job.pause(); job.resume(); job.stop()
        >>> job.wait()

    Args:
        events: makes the generator (called on the MLX thread); what it returns is the job's result.
        on_event: called on the MLX thread with every event; must be quick.
        on_end: called on the MLX thread once, with the job, when it has ended for whatever reason.

    Attributes:
        events: makes the generator, so that an interrupted job can be started anew.
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
            state = self.state
            if state == "paused":
                self.state = "running"
        if state == "idle":
            self._end("stopped")
        elif state == "paused":
            _thread.submit(self._step)  # which closes the generator, on its own thread

    def pause(self) -> None:
        """Pause the job after its current step; ``resume`` goes on."""
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
        """Make one step and queue the next one, behind the calls that wait by then."""
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
        except StopIteration as end:
            return self._end("done", result=end.value)
        except BaseException as error:  # raised again by ``wait``
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


class LatestJob:
    """Runs the jobs of one owner, such as a panel, one at a time: a new one replaces the old one.

    A new background job stops the one before. A blocking job (``run``) stops it too, and starts it
    again afterwards.

    Args:
        on_change: called, at most ten times a second while a job runs, whenever ``progress`` or
            ``error`` has changed.

    Attributes:
        progress: last event of the running background job, or None.
        error: what the last background job failed with, in words, or an empty string.
    """

    def __init__(self, on_change: Callable[[], None]) -> None:
        self._on_change = on_change
        self._job: Job | None = None
        self._last_tick = 0.0
        self.progress: Any = None
        self.error = ""

    def start(self, events: Callable[[], Generator[Any, None, Any]]) -> None:
        """Run a job in the background, in the place of the one that runs there now."""
        self.stop()
        self.error = ""
        self._job = Job(events, self._event, self._end).start()

    def run(self, events: Callable[[], Generator[Any, None, Any]]) -> Any:
        """Run a job and wait for its result.

        What ran in the background is stopped first and started again afterwards.
        """
        interrupted = self._job
        if interrupted is not None and (not interrupted.active or interrupted.stopping):
            interrupted = None
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
        now = time.monotonic()
        if now - self._last_tick > _TICK_S:
            self._last_tick = now
            self._on_change()

    def _end(self, job: Job | None) -> None:
        if job is not None and job is not self._job:
            return  # a newer job has taken over the display
        self.progress = None
        if job is not None and job.error is not None:
            self.error = str(job.error) or type(job.error).__name__
        self._on_change()
