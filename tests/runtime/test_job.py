"""The one MLX thread and its jobs."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from qlab.runtime.job import Job
from qlab.runtime.job import LatestJob
from qlab.runtime.job import mlx_call
from qlab.errors import BusyError


def test_all_work_happens_on_one_thread_and_calls_are_served_between_steps():
    threads = {mlx_call(threading.current_thread).name for _ in range(3)}
    assert threads == {"qlab-mlx"}

    def endless():
        while True:
            time.sleep(0.005)
            yield 1

    job = Job(endless).start()
    assert mlx_call(lambda: 42) == 42
    job.stop()
    assert job.wait() is None and job.state == "stopped"


def test_pause_holds_and_resume_goes_on():
    seen = []

    def count():
        for i in range(1000):
            time.sleep(0.002)
            yield i
        return "end"

    job = Job(count, on_event=seen.append).start()
    while len(seen) < 3:
        time.sleep(0.01)
    job.pause()
    time.sleep(0.2)
    held = len(seen)
    time.sleep(0.05)
    assert len(seen) == held and job.state == "paused"
    job.resume()
    end = time.monotonic() + 10
    while len(seen) == held and time.monotonic() < end:
        time.sleep(0.01)
    assert len(seen) > held
    job.stop()
    job.wait()


def test_failure_is_raised_where_it_is_waited_for_and_a_job_starts_once():
    def fail():
        yield 1
        raise ValueError("so it goes")

    job = Job(fail).start()
    with pytest.raises(ValueError, match="so it goes"):
        job.wait()
    assert job.state == "failed"
    with pytest.raises(BusyError):
        job.start()


def test_newer_job_replaces_the_older_and_a_blocking_one_gives_the_place_back():
    done = []

    def forever(name):
        def events():
            while True:
                time.sleep(0.002)
                done.append(name)
                yield name

        return events

    latest = LatestJob(lambda: None)
    latest.start(forever("a"))
    latest.start(forever("b"))

    def short():
        yield "c"
        return "result"

    assert latest.run(short) == "result"
    done.clear()
    until = time.monotonic() + 20  # a busy machine begins late
    while not done and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.05)
    assert set(done) == {"b"}
    latest.stop()
    latest.wait()


def test_process_that_used_the_thread_ends_cleanly():
    code = "import qlab; from qlab.runtime.job import mlx_call; import mlx.core as mx; mlx_call(lambda: mx.eval(mx.random.normal((8,))))"
    for _ in range(3):
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_process_that_ends_under_a_job_ends_the_job_first_and_answers_what_asks_afterwards():
    script = """
import atexit, qlab, time
from qlab.runtime.job import Job, mlx_call
def late():
    try: mlx_call(int)
    except RuntimeError as error: print(error, flush=True)
atexit.register(late)  # runs after the thread has ended
def work():
    try:
        while True: yield time.sleep(0.01)
    finally: print("saved", flush=True)
Job(work).start(); held = Job(work).start(); time.sleep(0.1); held.pause()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split("\n") == [
        "saved",
        "saved",
        "The process is ending; MLX is closed.",
        "",
    ]


def test_a_job_that_was_stopped_is_not_begun_again_after_one_that_takes_its_place():
    begun = []

    def slow():
        begun.append(1)
        while True:
            time.sleep(0.02)
            yield 1

    def short():
        yield "c"
        return "result"

    latest = LatestJob(lambda: None)
    latest.start(slow)
    while not begun:
        time.sleep(0.01)
    latest.stop()
    assert latest.run(short) == "result"
    time.sleep(0.1)
    assert begun == [1]
