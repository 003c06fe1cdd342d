"""The trainer as a user holds it: start, pause, stop, resume, generate, and everything that it refuses."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref

import mlx.core as mx
import numpy as np
import pytest
from IPython.lib.pretty import pretty
from mlx.utils import tree_flatten

import qlab
from qlab.core.train.rows import Row
from qlab.core.train.rows import Rows
from qlab.engine.train import checkpoint
from qlab.runtime.job import mlx_call
from qlab.errors import BusyError
from qlab.errors import ConfigError
from qlab.errors import DataError
from qlab.errors import LoadError
from qlab.errors import QlabError
from qlab.errors import SaveError

ROWS = [
    {"text": f"Row {n}: the {word} of the house was very {word}."}
    for n, word in enumerate(["tall", "kind", "odd"] * 10)
]
SMALL = {"rank": 4, "num_layers": 1, "keys": ["q_proj", "v_proj"]}
CONFIG = qlab.TrainConfig(
    iters=6, batch_size=2, max_seq_length=24, learning_rate=1e-3, steps_per_eval=3
)


@pytest.fixture(scope="module")
def base(demo):
    q = qlab.Quantizer(demo, bits=4)
    yield q.quantize()
    q.close()


@pytest.fixture
def adapter(base):
    return qlab.Adapter(base, **SMALL)


def copied(parameters):
    return mlx_call(lambda: {path: mx.array(array) for path, array in parameters.items()})


def arrays_of(model):
    return mlx_call(lambda: dict(tree_flatten(model.module.parameters())))


def same(one, two) -> bool:
    return mlx_call(
        lambda: one.keys() == two.keys() and all(mx.array_equal(one[p], two[p]).item() for p in one)
    )


def until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def test_a_run_trains_the_adapter_and_leaves_the_base_as_it_was(adapter, base, tmp_path):
    before = copied(arrays_of(base))
    seen = []
    trainer = qlab.Trainer(adapter, ROWS, CONFIG, path=tmp_path, callbacks=[seen.append])
    assert trainer.status == "idle" and trainer.report.steps == 0
    report = trainer.run()
    assert report.status == "done" and report.steps == 6 and report.best_step in (3, 6)
    assert [event.step for event in seen] == list(range(7)) and len(trainer.history) == 7
    assert adapter.trained and adapter.origin.endswith("step 6")
    assert report.predicted_nbytes == pytest.approx(report.peak_nbytes, rel=0.25)
    assert same(before, arrays_of(base))
    assert "✓ done · step 6 of 6 · " in repr(trainer)
    assert "<table" in trainer._repr_html_()
    with pytest.raises(BusyError, match="All steps are done"):
        trainer.start()


def test_an_event_that_was_shown_never_changes(adapter, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("qlab.engine.train.session._TICK_S", -1.0)
    monkeypatch.setattr(
        qlab.Trainer,
        "_show",
        lambda trainer: seen.append((trainer.status, trainer.events, trainer.report.steps)),
    )
    trainer = qlab.Trainer(adapter, ROWS, CONFIG, val=8, path=tmp_path)
    trainer.run()
    assert len(seen) > 15 and seen[-1] == ("done", trainer.events, 6)
    for _, events, steps in seen:
        assert all(one is other for one, other in zip(events, trainer.events, strict=False))
        assert steps == max(len(events) - 1, 0)


def test_prompts_are_asked_at_every_validation(adapter, tmp_path):
    trainer = qlab.Trainer(adapter, ROWS, CONFIG, path=tmp_path, prompts="The house")
    trainer.run()
    assert [(item.step, item.prompt) for item in trainer.state().generations] == [
        (step, "The house") for step in (0, 3, 6)
    ]


def test_pause_holds_resume_goes_on_stop_keeps_and_start_goes_on(adapter, tmp_path):
    config = qlab.TrainConfig(
        iters=400, batch_size=2, max_seq_length=24, learning_rate=1e-3, steps_per_eval=3
    )
    trainer = qlab.Trainer(adapter, ROWS, config, path=tmp_path).start()
    until(lambda: trainer.report.steps > 2)
    trainer.pause()
    until(lambda: trainer.status == "paused")
    time.sleep(3)  # the present step ends first, and the machine may be busy
    steps = trainer.report.steps
    time.sleep(0.5)
    assert trainer.report.steps == steps
    trainer.learning_rate = 5e-4
    assert (
        isinstance(trainer.generate("The", max_tokens=3), str)
        and trainer.state().generations[-1].step == steps
    )
    trainer.resume()
    until(lambda: trainer.report.steps > steps)
    trainer.stop()
    trainer.wait()
    assert trainer.status == "stopped" and 0 < trainer.report.steps < 400
    assert trainer.events[-1].learning_rate == 5e-4
    assert checkpoint.latest(tmp_path).name == f"step-{trainer.report.steps:06d}"
    steps = trainer.report.steps
    trainer.start()
    until(lambda: trainer.report.steps > steps)
    trainer.stop()
    trainer.wait()
    trainer.load_best()
    assert adapter.origin.startswith("best of")


def test_the_adapter_is_the_users_once_the_run_is_over(adapter, tmp_path):
    config = qlab.TrainConfig(
        iters=6, batch_size=2, max_seq_length=24, steps_per_eval=2, learning_rate=0.3
    )
    trainer = qlab.Trainer(adapter, ROWS, config, val=ROWS[:2], path=tmp_path)
    trainer.run()
    losses = {event.step: event.val_loss for event in trainer.events if event.val_loss}
    best = min(losses, key=losses.get)
    trainer.load_best()
    trainer.evaluate()
    trainer.generate("The", max_tokens=2)
    assert adapter.origin == f"best of {tmp_path.name}, best-{best:06d}"
    assert trainer.state().generations[-1].step == best
    adapter.reset()
    trainer.generate("The", max_tokens=2)
    assert not adapter.trained and trainer.state().generations[-1].step == 0
    adapter.rank = 2
    assert isinstance(trainer.generate("The", max_tokens=2), str)


def test_a_run_that_is_over_leaves_the_adapter_to_the_next_one(adapter, tmp_path):
    config = qlab.TrainConfig(iters=2, batch_size=2, max_seq_length=24, steps_per_eval=1)
    first = qlab.Trainer(adapter, ROWS, config, val=ROWS[:2], path=tmp_path / "first")
    first.run()
    seen = []

    def ask(event):
        if event.step == 1:
            for act in (first.load_best, adapter.reset):
                with pytest.raises(BusyError, match="The run 'second' trains this adapter"):
                    act()
            before = adapter.version
            first.generate("The", max_tokens=2)
            seen.append(adapter.version - before)

    second = qlab.Trainer(
        adapter, ROWS, config, val=ROWS[:2], path=tmp_path / "second", callbacks=[ask]
    )
    second.run()
    assert seen == [0]  # empty if the callback failed
    first.evaluate()
    first.generate("The", max_tokens=2)
    assert adapter.origin == "second, step 2"


def test_a_stopped_run_does_not_go_on_with_another_adapter_or_base(demo, tmp_path):
    q = qlab.Quantizer(demo, bits=4)
    adapter = qlab.Adapter(q, **SMALL)
    trainer = qlab.Trainer(
        adapter,
        ROWS,
        qlab.TrainConfig(iters=6, batch_size=2, max_seq_length=24),
        val=0,
        path=tmp_path,
        callbacks=[lambda event: event.step == 2 and trainer.stop()],
    )
    trainer.run()
    adapter.reset()
    adapter.rank = 8
    with pytest.raises(ConfigError, match="trains rank=4, and the adapter has rank=8 now"):
        trainer.start()
    adapter.rank = 4
    scale = adapter.scale
    adapter.scale = scale * 2
    with pytest.raises(ConfigError, match=f"trains scale={scale}, .* scale={scale * 2} now"):
        trainer.start()
    adapter.scale = scale
    q.bits = 3
    with pytest.raises(ConfigError, match="trains on affine 4-bit g64, .*affine 3-bit g64"):
        trainer.start()
    q.bits = 4
    assert trainer.run().status == "done"
    q.close()


def test_the_panel_of_a_paused_run_shows_its_last_step(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("qlab.engine.train.session._TICK_S", 1e9)
    config = qlab.TrainConfig(iters=400, batch_size=2, max_seq_length=24)
    trainer = qlab.Trainer(
        adapter,
        ROWS,
        config,
        val=0,
        path=tmp_path,
        callbacks=[lambda event: event.step == 5 and trainer.pause()],
    )
    shown = trainer.widget
    trainer.start()
    until(lambda: shown.state["steps"] == 5)
    assert shown.state["status"] == "paused"
    trainer.close()
    trainer.wait()


def test_another_run_on_the_same_model_is_refused_while_one_is_under_way(adapter, base, tmp_path):
    config = qlab.TrainConfig(iters=400, batch_size=2, max_seq_length=24)
    first = qlab.Trainer(adapter, ROWS, config, path=tmp_path / "a").start()
    other = qlab.Trainer(qlab.Adapter(base, **SMALL), ROWS, config, path=tmp_path / "b")
    with pytest.raises(BusyError, match="The run 'a' trains on this model"):
        other.start()
    for act in (first.start, first.probe, first.load_best):
        with pytest.raises(BusyError):
            act()
    first.stop()
    first.wait()
    other.start()
    other.stop()
    other.wait()


def test_sliders_that_move_during_a_run_change_neither_its_base_nor_its_adapter(demo, tmp_path):
    q = qlab.Quantizer(demo, bits=4)
    adapter = qlab.Adapter(q, **SMALL)
    moved = []

    def move(event):
        if event.step == 2:
            q.bits = 3
            for change in (lambda: setattr(adapter, "rank", 8), adapter.reset):
                with pytest.raises(QlabError) as caught:
                    change()
                moved.append(str(caught.value))

    trainer = qlab.Trainer(adapter, ROWS, CONFIG, path=tmp_path, callbacks=[move])
    assert trainer.run().status == "done" and not any(
        "callback" in note for note in trainer.report.notes
    )
    assert "Another rank" in moved[0] and "stop it first" in moved[1] and adapter.rank == 4
    assert adapter.base.plan.default.bits == 4 and adapter.origin.endswith("step 6") and q.bits == 3
    adapter.reset()
    assert adapter.plan.default.bits == 3
    q.close()


def test_a_run_that_learned_nothing_leaves_the_adapter_as_it_was(demo, tmp_path, monkeypatch):
    q = qlab.Quantizer(demo, bits=4)
    adapter = qlab.Adapter(q, **SMALL)
    trainer = qlab.Trainer(adapter, ROWS, CONFIG, path=tmp_path)
    monkeypatch.setattr("qlab.engine.train.setup.choose_compute", lambda *inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.run()
    assert trainer.status == "failed" and not adapter.trained and not adapter.run
    predicted = trainer.estimate.total_nbytes
    adapter.rank = 8
    assert trainer.estimate.total_nbytes > predicted
    q.bits = 3
    assert adapter.plan.default.bits == 3
    monkeypatch.undo()
    assert trainer.run().adapter == "lora r8" and adapter.base.plan.default.bits == 3
    q.close()


def test_runs_are_told_after_their_trainers_and_models_are_gone(demo, tmp_path):
    q = qlab.Quantizer(demo, bits=4)
    trainer = qlab.Trainer(qlab.Adapter(q, **SMALL), ROWS, CONFIG, path=tmp_path / "short")
    trainer.run()
    base, events = weakref.ref(trainer.adapter.base), trainer.events
    q.close()
    del trainer, q
    gc.collect()
    assert base() is None
    told = dict(
        zip([report.name for report in qlab.runs().reports], qlab.runs().histories, strict=True)
    )
    assert told["short"] == events


def test_trainers_made_in_one_second_have_folders_of_their_own(adapter):
    assert len({qlab.Trainer(adapter, ROWS, CONFIG).path for _ in range(3)}) == 3


def test_a_folder_that_another_run_has_taken_meanwhile_is_refused_and_left_alone(
    adapter, base, tmp_path
):
    first, second = (
        qlab.Trainer(qlab.Adapter(base, **SMALL), ROWS, CONFIG, path=tmp_path) for _ in range(2)
    )
    first.run()
    with pytest.raises(BusyError, match="make a new Trainer"):
        second.run()
    assert (
        second.status == "failed"
        and checkpoint.latest(tmp_path).name == "step-000006"
        and not second.adapter.trained
    )


def test_a_second_run_on_the_same_path_touches_nothing_of_the_first(adapter, base, tmp_path):
    first = qlab.Trainer(adapter, ROWS, CONFIG, path=tmp_path / "run")
    first.run()
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    second = qlab.Trainer(
        qlab.Adapter(base, **SMALL),
        ROWS,
        qlab.TrainConfig(iters=2, batch_size=2, max_seq_length=24),
        path=first.path,
    )
    assert second.path == tmp_path / "run-2"
    second.run()
    assert before == {
        file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()
    }
    assert checkpoint.latest(second.path).name == "step-000002"


def test_a_run_that_goes_on_from_an_earlier_checkpoint_keeps_what_it_writes(adapter, tmp_path):
    config = qlab.TrainConfig(iters=12, batch_size=2, max_seq_length=24, steps_per_save=4)
    qlab.Trainer(adapter, ROWS, config, val=0, path=tmp_path).run()
    assert checkpoint.latest(tmp_path).name == "step-000012"
    again = qlab.Trainer.load(
        tmp_path / "step-000008",
        adapter,
        callbacks=[lambda event: event.step == 9 and again.stop()],
    )
    again.run()
    assert again.path == tmp_path and again.report.steps == 9 and again.status == "stopped"
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == ["step-000008", "step-000009"]


def test_a_callback_that_fails_is_told_and_does_not_end_the_run(adapter, tmp_path):
    def bad(event):
        raise RuntimeError("disk of the reporter is full")

    report = qlab.Trainer(adapter, ROWS, CONFIG, path=tmp_path, callbacks=[bad]).run()
    assert report.status == "done" and any(
        "disk of the reporter is full" in note for note in report.notes
    )


def test_a_callback_that_wants_to_know_hears_the_end(adapter, tmp_path):
    class Reporter:
        ended = None

        def __call__(self, event):
            pass

        def finish(self, report):
            self.ended = report

    reporter = Reporter()
    qlab.Trainer(adapter, ROWS, CONFIG, path=tmp_path, callbacks=[reporter]).run()
    assert reporter.ended.steps == 6 and reporter.ended.status == "done"


def test_an_interrupt_stops_cleanly_and_keeps_what_was_learned(adapter, tmp_path):
    trainer = qlab.Trainer(
        adapter, ROWS, qlab.TrainConfig(iters=5000, batch_size=2, max_seq_length=24), path=tmp_path
    )

    def interrupt():
        until(lambda: trainer.report.steps > 3)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert trainer.status == "stopped" and checkpoint.latest(tmp_path) and adapter.trained


KILLED = """
    import os, signal, sys
    import qlab
    q = qlab.Quantizer(qlab.load("demo"), bits=4)
    rows = [{"text": f"Row {n}: the %s of the house." % word} for n, word in enumerate(["tall", "kind", "odd"] * 10)]
    config = qlab.TrainConfig(iters=40, batch_size=2, max_seq_length=24, learning_rate=1e-3, steps_per_save=20,
                              lr_schedule="cosine", warmup=4)
    def end(event):
        if event.step == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
    a = qlab.Adapter(q, rank=4, num_layers=1, keys=["q_proj", "v_proj"], dropout=0.1)
    qlab.Trainer(a, rows, config, path=sys.argv[1], callbacks=[end]).run()
"""


def test_a_killed_kernel_resumes_from_the_folder_alone_and_ends_bit_for_bit_the_same(tmp_path):
    script = textwrap.dedent(KILLED)
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "cut", "23"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    subprocess.run(
        [sys.executable, "-c", script, tmp_path / "whole", "-1"],
        check=True,
        timeout=300,
        capture_output=True,
    )
    trainer = qlab.Trainer.load(tmp_path / "cut")
    assert trainer.status == "idle" and trainer.adapter.origin == "checkpoint step-000020"
    report = trainer.run()
    assert report.steps == 40 and [event.step for event in trainer.events] == list(range(41))
    wanted = mlx_call(checkpoint.read_parameters, tmp_path / "whole" / "step-000040")
    assert same(trainer.adapter.parameters, wanted)
    qlab.Trainer.load(tmp_path / "whole" / "step-000020")
    with pytest.raises(LoadError, match="no checkpoint that opens"):
        qlab.Trainer.load(tmp_path)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda a: qlab.Trainer("a", ROWS), ConfigError, "give a qlab.Adapter"),
        (lambda a: qlab.Trainer(a, ROWS, {"iters": 3}), ConfigError, "give a qlab.TrainConfig"),
        (lambda a: qlab.Trainer(a, []), DataError, "nothing to train on|no rows"),
        (lambda a: qlab.Trainer(a, [{"txt": "x"}]), DataError, "row 0.*'txt'"),
        (lambda a: qlab.Trainer(a, ROWS, val=1.5), QlabError, "held out"),
        (lambda a: qlab.Trainer(a, ROWS, val=[{"prompt": "x"}]), DataError, "row 0"),
        (
            lambda a: qlab.Trainer(a, ROWS, val=True),
            DataError,
            "True of 30 rows cannot be held out",
        ),
        (
            lambda a: qlab.Trainer(a, ROWS, val=float("nan")),
            DataError,
            "nan of 30 rows cannot be held out",
        ),
        (
            lambda a: qlab.Trainer(a, ROWS, val=30),
            DataError,
            "30 of 30 rows cannot be held out; hold out 1 to 29",
        ),
        (lambda a: qlab.Trainer(a, ROWS, path=3), ConfigError, "path=3 is not legal"),
        (lambda a: qlab.Trainer(a, ROWS, prompts=3), ConfigError, "prompt=3 is not legal"),
        (lambda a: qlab.Trainer(a, ROWS, prompts=[""]), ConfigError, "The prompt is empty"),
        (lambda a: qlab.Trainer(a, ROWS, callbacks=3), ConfigError, "callbacks=3 is not legal"),
        (lambda a: qlab.Trainer(a, ROWS).generate(""), ConfigError, "The prompt is empty"),
        (
            lambda a: qlab.Trainer(a, ROWS).generate("a", 0),
            ConfigError,
            "max_tokens=0 is not legal",
        ),
        (lambda a: qlab.Trainer(a, ROWS).load_best(), LoadError, "holds no best adapter"),
        (
            lambda a: qlab.Trainer(
                a,
                Rows(
                    (
                        Row(
                            number=7,
                            tokens=np.array([1, 5000], np.int32),
                            mask=np.array([0, 1], np.uint8),
                        ),
                    )
                ),
            ),
            DataError,
            "row 7: token 5000",
        ),
        (lambda a: qlab.Trainer(a, ROWS, prompts=[3]), ConfigError, "prompt=3 is not legal"),
        (
            lambda a: qlab.Trainer(a, ROWS, callbacks=["print"]),
            ConfigError,
            "callbacks='print' is not legal",
        ),
        (
            lambda a: setattr(qlab.Trainer(a, ROWS), "learning_rate", -1),
            ConfigError,
            "learning_rate=-1 is not legal",
        ),
        (
            lambda a: setattr(qlab.Trainer(a, ROWS), "learning_rate", "high"),
            ConfigError,
            "learning_rate='high' is not legal",
        ),
    ],
)
def test_what_is_wrong_is_refused_before_anything_runs(adapter, make, error, says):
    before, config = dict(adapter.parameters), adapter.config
    with pytest.raises(error, match=says):
        make(adapter)
    assert not adapter.trained and adapter.config == config and same(before, adapter.parameters)


def test_the_code_of_a_run_makes_it_again(adapter, tmp_path):
    trainer = qlab.Trainer(adapter, ROWS, CONFIG, path=tmp_path)
    made = {}
    exec(
        trainer.state().code.replace("t.start()", "made['t'] = t"),
        {"qlab": qlab, "a": adapter, "data": ROWS, "made": made},
    )
    assert made["t"].config == CONFIG


def test_a_run_is_judged_beside_its_base_and_the_original(demo, tmp_path):
    q = qlab.Quantizer(demo, bits=2)
    adapter = qlab.Adapter(q, **SMALL)
    trainer = qlab.Trainer(adapter, ROWS, CONFIG, val=0.2, path=tmp_path)
    trainer.run()
    report = trainer.evaluate(golden=[{"prompt": "The house", "expected": "x"}], max_tokens=2)
    assert [column.name for column in report.columns] == [
        "full precision",
        "quantized",
        "quantized + adapter",
    ]
    full, bare, adapted = report.columns
    assert full.kl_nats == 0 and bare.kl_nats > 0.05 and bare.nll != adapted.nll
    assert "<table" in report._repr_html_() and len(report.samples) == 1
    exact = trainer.evaluate(keep=demo.spec.vocabulary)
    assert (
        "exact; floor of the KL 0 nats" in repr(exact) and exact.columns[1].kl_nats >= bare.kl_nats
    )
    assert pretty(trainer.report).startswith(
        f"{trainer.path.name}: affine 2-bit g64, lora r4: done after "
    )
    assert len(qlab.runs()) >= 1 and trainer.path.name in repr(qlab.runs())
    q.close()


def test_the_run_for_stock_mlx_lm_names_a_saved_base(adapter, base, demo, tmp_path):
    trainer = qlab.Trainer(adapter, ROWS, CONFIG, path=tmp_path)
    with pytest.raises(ConfigError, match="save it with a.base.save"):
        trainer.to_yaml("data")
    assert "iters: 6" in trainer.to_yaml("data", model="base-4bit")


def test_rows_held_out_by_the_user_and_none_at_all(adapter, tmp_path):
    none = qlab.Trainer(adapter, ROWS, CONFIG, val=0, path=tmp_path)
    assert none.held_out is None and len(none.rows) == 30
    with pytest.raises(ConfigError, match="nothing to evaluate on"):
        none.evaluate()
    own = qlab.Trainer(adapter, ROWS, CONFIG, val=ROWS[:3], path=tmp_path)
    assert len(own.held_out) == 3 and len(own.rows) == 30
    counted = qlab.Trainer(adapter, ROWS, CONFIG, val=4, path=tmp_path)
    assert len(counted.held_out) == 4 and len(counted.rows) == 26
    with pytest.warns(DeprecationWarning, match="use held_out"):
        assert counted.held is counted.held_out
    assert "<ins" in counted.data._repr_html_() and "26" in repr(counted.data)


def test_a_last_checkpoint_that_cannot_be_written_is_told_when_the_run_ends(
    adapter, tmp_path, monkeypatch
):
    trainer = qlab.Trainer(adapter, ROWS, CONFIG, val=0, path=tmp_path / "run")

    def full(self, state):
        raise SaveError("the disk is full")

    monkeypatch.setattr(checkpoint.Checkpoints, "save", full)
    report = trainer.run()
    assert report.status == "done" and report.notes[-1] == "not written: the disk is full"
