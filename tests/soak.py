"""A run under all that a restless user does at once: pauses, rates, slider storms, questions, other cells.

    python -m tests.soak

Prints what was found as JSON, and the threads that are left when the interpreter ends; ``tests/test_soak.py`` judges it. The
browser is played by comms that count what they are sent, and intents arrive as messages, as they do from JupyterLab.
"""

from __future__ import annotations

import atexit
import threading

if __name__ == "__main__":  # the first to be registered is the last to be called
    atexit.register(lambda: print("left:", [thread.name for thread in threading.enumerate()]))

import qlab  # noqa: E402

import gc  # noqa: E402
import json  # noqa: E402
import random  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import comm  # noqa: E402
import mlx.core as mx  # noqa: E402
import psutil  # noqa: E402

from qlab.runtime import peaks as record
from qlab.runtime.job import mlx_call
from qlab.engine.io.loaded import Loaded
from qlab.lab.model import Model
from tests.tiny import settings, tiny  # noqa: E402

ROWS = [
    {"text": f"Row {n}: the {word} of the house was very {word}."}
    for n, word in enumerate(["tall", "kind", "odd"] * 10)
]
CONFIG = qlab.TrainConfig(
    iters=1000,
    batch_size=1,
    max_seq_length=8,
    learning_rate=1e-3,
    steps_per_eval=50,
    steps_per_save=100,
)
SMALL = {"rank": 4, "num_layers": 1, "keys": ["q_proj", "v_proj"]}
RATES = (1e-3, 5e-4, 2e-3, 1e-4)
EARLY = 10  # the step after which nothing may grow any more


class Comm(comm.base_comm.BaseComm):
    """What a browser would get."""

    largest = 0

    def publish_msg(self, msg_type, data=None, metadata=None, buffers=None, **_) -> None:
        text = json.dumps(data, allow_nan=False)  # as the kernel sends it
        Comm.largest = max(
            Comm.largest, len(text) + sum(len(memoryview(buffer)) for buffer in buffers or ())
        )


def intend(shown: Any, **intent: Any) -> None:
    """Send an intent as the browser does."""
    state = {"intent": {**intent, "seq": time.time_ns() // 1000}}
    data = {"method": "update", "state": state, "buffer_paths": []}
    shown.widget.controls.comm.handle_msg({"content": {"data": data}, "buffers": []})


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Wait."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.005)


def again_and_again(
    work: Callable[[], Any], pause: float, over: threading.Event, faults: list[str]
) -> threading.Thread:
    """Do something in a thread of its own until it is over."""

    def loop() -> None:
        while not over.wait(pause):
            try:
                work()
            except Exception as error:
                faults.append(f"{type(error).__name__}: {error}")

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    return thread


def quiet(t: Any, panels: tuple[Any, ...]) -> dict[str, int]:
    """Measure memory while nothing is under way but the run, which stands still and has just been asked something."""
    for panel in panels:
        panel._jobs.wait()
    t.generate("The house", 2)
    gc.collect()
    mlx_call(mx.clear_cache)
    return {"active": mlx_call(mx.get_active_memory), "rss": rss()}


def rss() -> int:
    """Bytes that the process holds in memory."""
    return psutil.Process().memory_info().rss


def storm(rng: random.Random, t: Any, q: Any, held: Any, free: Any) -> None:
    """Do one of the things that users do."""
    kind = rng.choice(("pause", "pause", "rate", "rate", "adapter", "cell", "quantizer"))
    if kind == "pause":
        intend(t, op="pause")
        time.sleep(rng.random() * 0.04)
        intend(t, op="resume")
    elif kind == "rate":
        intend(t, op="learning_rate", value=rng.choice(RATES))
        intend(t, op="learning_rate", value=-1.0)  # is refused
    elif kind == "quantizer":
        for _ in range(8):
            mode, bits, group = rng.choice(
                (("affine", 3, 32), ("affine", 4, 64), ("affine", 7, 64), ("mxfp4", 4, 32))
            )
            intend(q, op="set", mode=mode, bits=bits, group_size=group)
            time.sleep(0.01)
    elif kind == "adapter":
        for _ in range(8):
            intend(free, op="set", config={"rank": rng.choice((1, 4, 8, 32, 10_000))})
        intend(t, op="pause")  # so that the run cannot end meanwhile, and the adapter be free
        mlx_call(lambda: None)  # waits for the step under way
        if t.status == "paused":
            intend(held, op="set", config={"rank": 8})  # is refused: it is being trained
            intend(held, op="set", config={"scale": rng.choice((1.0, 2.0))})
            intend(held, op="reset")  # is refused, too
        intend(t, op="resume")
    else:
        q.set("model.layers.0.*", bits=rng.choice((None, 4, 8)), mode="affine")
        q.unset()
        _ = q.code, free.code, held.alpha
    time.sleep(rng.random() * 0.02)


def main() -> None:
    """Make the run, disturbed and undisturbed."""
    comm.create_comm = Comm
    rng, over, faults = random.Random(5), threading.Event(), []
    asked: list[str] = []
    tokenizer = qlab.load("demo").tokenizer
    size = {"vocab_size": len(tokenizer)}  # small, since only the steps of others are of interest
    config = settings("llama", **size)
    loaded = Loaded(module=tiny(**size)[0], tokenizer=tokenizer, config=config, name="tiny")
    q = qlab.Quantizer(Model(loaded), bits=4)
    held, free = qlab.Adapter(q, **SMALL), qlab.Adapter(q, **SMALL)
    with tempfile.TemporaryDirectory() as folder:
        record.cache_folder = lambda: Path(
            folder
        )  # peaks of so small a model are not this machine's
        t = qlab.Trainer(held, ROWS, CONFIG, val=3, path=f"{folder}/disturbed", prompts="The")
        panels = (q, held, free)
        for shown in (t, *panels):
            shown._repr_mimebundle_()
            intend(shown, op="hello")
        intend(t, op="start")
        until(lambda: len(t.events) > EARLY)
        intend(t, op="pause")
        early = quiet(t, panels)
        intend(t, op="resume")
        threads = [
            again_and_again(lambda: asked.append(t.generate("The house", 2)), 0.1, over, faults),
            again_and_again(
                lambda: (repr(t), t._repr_html_(), t.history, repr(qlab.runs())), 0.2, over, faults
            ),
            again_and_again(
                lambda: (t.state(), t.report, t.data, q.state(), free.state(), repr(held)),
                0.05,
                over,
                faults,
            ),
        ]
        half = 0
        while t.status in ("running", "paused"):
            storm(rng, t, q, held, free)
            half = half or (rss() if t.report.steps >= CONFIG.iters // 2 else 0)
        over.set()
        for thread in threads:
            thread.join()
        t.wait()
        intend(q, op="set", mode="affine", bits=4, group_size=64)
        intend(t, op="hello")  # takes the last refusal off the panel
        late = quiet(t, panels)
        shown, generations = t.widget.state, t.state().generations
        for one in (t, *panels):
            one.close()

        plain = qlab.Adapter(held.base, **SMALL)
        rates = [event.learning_rate for event in t.events]

        def follow(event: Any) -> None:
            if event.step + 1 < len(rates):
                again.learning_rate = rates[event.step + 1]

        again = qlab.Trainer(plain, ROWS, CONFIG, val=3, path=f"{folder}/plain", callbacks=[follow])
        again.run()
    found = {
        "early": early,
        "late": late,
        "half": half,
        "faults": faults,
        "asked": asked,
        "answered": [item.text for item in generations if item.prompt == "The house"][1:-1],
        "steps": [event.step for event in t.events],
        "rates": sorted(set(rates)),
        "curves": [
            [repr((e.loss, e.grad_norm, e.val_loss)) for e in run.events] for run in (t, again)
        ],
        "shown": {key: shown[key] for key in ("status", "steps", "error")},
        "largest": Comm.largest,
        "threads": [thread.name for thread in threading.enumerate()],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
