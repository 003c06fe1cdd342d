"""``python -m qlab.run``: a notebook's run alone and in two processes, ended, gone on with, and everything that it refuses."""

from __future__ import annotations

import gc
import io
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace

import qlab

import mlx.core as mx
import numpy as np
import pytest
import yaml

from qlab.engine.train import checkpoint
from qlab.engine.train import run_file
from qlab.engine.train import run_folder
from qlab.runtime.job import mlx_call
from qlab.errors import ConfigError
from qlab.run import _adapter
from qlab.run import main
from tests.ring import QUIET, ROOT, launch

ROWS = [
    {"text": f"Row {n}: the {word} of the house was very {word}."}
    for n, word in enumerate(["tall", "kind", "odd"] * 10)
]
CONFIG = qlab.TrainConfig(
    iters=8, batch_size=4, max_seq_length=24, learning_rate=1e-3, steps_per_eval=4, steps_per_save=4
)


@pytest.fixture(scope="module")
def notebook(tmp_path_factory, demo):
    """A run as a notebook makes it, and the file that carries it."""
    folder = tmp_path_factory.mktemp("notebook")
    q = qlab.Quantizer(demo, bits=4)
    q.set("model.layers.0.mlp.down_proj", bits=8)
    a = qlab.Adapter(q, rank=4, num_layers=1, keys=["q_proj", "v_proj"], seed=5)
    t = qlab.Trainer(a, ROWS, CONFIG, val=0.2, path=folder / "made")
    text = t.to_yaml()
    t.run()
    return t, text, folder


def written(notebook, path, **changes) -> str:
    """Write the notebook's run with another folder; return where."""
    found = {**yaml.safe_load(notebook[1]), "path": str(path), **changes}
    file = path.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(found))
    return str(file)


def history(folder) -> list[dict]:
    return json.loads((checkpoint.latest(folder) / "state.json").read_text())["history"]


def curve(folder, name: str) -> list[float]:
    return [event[name] for event in history(folder) if event[name] is not None]


def arrays(folder) -> dict[str, np.ndarray]:
    return mlx_call(
        lambda: {
            path: np.array(array) for path, array in checkpoint.read_parameters(folder).items()
        }
    )


def run(path) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    return main([str(path)], out, err), out.getvalue(), err.getvalue()


def test_one_process_makes_the_notebooks_run_bit_for_bit(notebook, tmp_path):
    code, said, errors = run(written(notebook, tmp_path / "out"))
    assert (code, errors) == (0, "")
    trainer, _, _ = notebook
    assert curve(tmp_path / "out", "loss")[1:] == [event.loss for event in trainer.events[1:]]
    assert curve(tmp_path / "out", "val_loss") == [
        event.val_loss for event in trainer.events if event.val_loss is not None
    ]
    assert (
        "storage: affine 4-bit g64" in said
        and "step 0/8 · loss – · val" in said
        and "steps: 8 of 8" in said
    )
    # from its last checkpoint but one the run ends in the same place
    wanted = arrays(tmp_path / "out" / "step-000008")
    assert run(tmp_path / "out" / "step-000004")[0] == 0
    found = arrays(tmp_path / "out" / "step-000008")
    assert found.keys() == wanted.keys() and all(
        np.array_equal(found[path], wanted[path]) for path in wanted
    )
    code, _, errors = run(written(notebook, tmp_path / "out"))
    assert code == 1 and "holds a run: python -m qlab.run" in errors


def test_two_processes_under_mlx_launch_make_the_same_run_and_one_writes(notebook, tmp_path, demo):
    tools = os.path.dirname(sys.executable)
    command = [
        f"{tools}/mlx.launch",
        "--backend",
        "ring",
        "-n",
        "2",
        "-p",
        str(20000 + os.getpid() % 20000),
    ]
    done = subprocess.run(
        [*command, sys.executable, "-m", "qlab.run", written(notebook, tmp_path / "out")],
        cwd=ROOT,
        env={**os.environ, **QUIET},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "steps: 8 of 8" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("step 0/8") == 1 and "processes: 2" in done.stdout
    trainer, _, _ = notebook
    assert curve(tmp_path / "out", "loss")[1:] == pytest.approx(
        [event.loss for event in trainer.events[1:]], rel=1e-5
    )
    judged = [event.val_loss for event in trainer.events if event.val_loss is not None]
    assert curve(tmp_path / "out", "val_loss") == pytest.approx(judged, rel=1e-5)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["out", "out.yaml"]
    held = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert held == ["best-000008", "rows.npz", "run.json", "step-000004", "step-000008"]
    loaded = qlab.Adapter.load(tmp_path / "out" / "step-000008", demo)
    for path, array in loaded.parameters.items():
        np.testing.assert_allclose(
            np.array(array), np.array(trainer.adapter.parameters[path]), atol=1e-4
        )


def test_an_interrupt_ends_the_run_with_a_checkpoint(notebook, tmp_path):
    file = written(
        notebook, tmp_path / "out", train={"iters": 10**6, "batch_size": 2, "max_seq_length": 24}
    )
    started = subprocess.Popen(
        [sys.executable, "-m", "qlab.run", file],
        cwd=ROOT,
        env={**os.environ, **QUIET},
        stdout=subprocess.PIPE,
        text=True,
    )
    next(line for line in started.stdout if line.startswith("step 0"))
    started.send_signal(signal.SIGINT)
    said, _ = started.communicate(timeout=60)
    assert started.returncode == 0 and "Stopped by SIGINT." in said
    assert checkpoint.latest(tmp_path / "out").name.startswith("step-")


def test_what_differs_or_fails_in_one_process_ends_both_and_the_first_says_it(notebook, tmp_path):
    files = [
        written(notebook, tmp_path / "a"),
        written(notebook, tmp_path / "b", train={"iters": 9, "batch_size": 4}),
    ]
    ended = launch([["-m", "qlab.run", file] for file in files], tmp_path)
    assert [code for code, _, _ in ended] == [1, 1]
    assert "These differ from rank 0" in ended[0][2] and "the settings (rank 1)" in ended[0][2]
    assert "the base" not in ended[0][2] and "qlab.run" not in ended[1][2]
    ended = launch(
        [["-m", "qlab.run", file] for file in (files[0], tmp_path / "none.yaml")], tmp_path
    )
    assert [code for code, _, _ in ended] == [1, 1]
    assert "rank 1: " in ended[0][2] and "none.yaml cannot be read" in ended[0][2]
    assert not (tmp_path / "a").exists()


def test_a_file_says_what_was_written_and_fills_the_rest_with_defaults(tmp_path, notebook):
    (tmp_path / "x.yaml").write_text(notebook[1])
    assert run_file.write(run_file.read(tmp_path / "x.yaml")) == notebook[1]
    text = (
        "model: demo\ndata: rows.jsonl\nval: 0.1\nquantize:\n  mode: mxfp4\n  overrides: {a.b: null, '*.c': {mode: affine, bits: 8}}\n"
        "adapter: {rank: 4, alpha: 16}\ntrain: {learning_rate: 1e-4}\nprompts: Hello\n"
    )
    (tmp_path / "x.yaml").write_text(text)
    file = run_file.read(tmp_path / "x.yaml")
    assert file.facts.train == qlab.TrainConfig(
        learning_rate=1e-4
    ) and file.facts.lora == qlab.LoRAConfig(rank=4, scale=4.0)
    own = {"a.b": None, "*.c": qlab.QuantConfig("affine", 8)}
    assert (
        file.facts.plan == qlab.QuantPlan(qlab.QuantConfig("mxfp4"), own)
        and file.facts.solver == "rtn"
    )
    assert (file.val, file.seed, file.start, file.facts.prompts) == (0.1, None, None, ("Hello",))


def test_a_trained_adapter_is_carried_along(demo, tmp_path, notebook):
    a = qlab.Adapter.load(notebook[2] / "made" / "step-000008", demo)
    t = qlab.Trainer(
        a,
        ROWS,
        qlab.TrainConfig(iters=1, batch_size=4, max_seq_length=24),
        val=0,
        path=tmp_path / "t",
    )
    (tmp_path / "x.yaml").write_text(f"{t.to_yaml()}\npath: {tmp_path / 'out'}\nprompts: The\n")
    t.run()
    code, said, _ = run(tmp_path / "x.yaml")
    assert code == 0 and said.count("'The' → ") == 1
    assert curve(tmp_path / "out", "loss") == [event.loss for event in t.events]


def test_a_base_without_a_folder_wants_one_and_a_saved_base_is_taken_as_it_is(notebook, tmp_path):
    t = notebook[0]
    fused = t.adapter.fuse(bits=8)
    made = qlab.Trainer(qlab.Adapter(fused, rank=4), ROWS, CONFIG, path=tmp_path / "t")
    with pytest.raises(ConfigError, match="The base has no folder; save it"):
        made.to_yaml()
    assert not (tmp_path / "t").exists()
    found = yaml.safe_load(t.to_yaml(model="saved-4bit"))
    assert found["model"] == "saved-4bit" and "quantize" not in found


def test_the_model_as_it_came_is_given_back_unless_a_start_needs_it(tmp_path):
    plan = qlab.QuantPlan(qlab.QuantConfig(bits=4))
    facts = run_folder.RunFacts(
        source="demo",
        plan=plan,
        solver="rtn",
        lora=qlab.LoRAConfig(rank=4),
        train=CONFIG,
        base="",
    )
    gc.collect()
    before = mlx_call(mx.get_active_memory)
    adapter = _adapter(facts)
    size = adapter.base.spec.nbytes
    gc.collect()
    assert mlx_call(mx.get_active_memory) - before < 1.1 * size
    adapter = _adapter(replace(facts, lora=qlab.LoRAConfig(rank=4, init="residual")))
    assert adapter.original is not None and adapter.parameters


BASIC = {"model": "demo", "data": "rows.jsonl"}
BAD = [
    ("model: demo\nmodel: demo\ndata: x", "'model' is there twice"),
    ("model: [demo", "is no YAML"),
    ("- a\n- b", "list of settings"),
    ("", "list of settings"),
    ({"model": "demo"}, "data must be given"),
    ({}, "model and data must be given"),
    ({**BASIC, "modle": 1}, "'modle' is no setting. Did you mean 'model'"),
    ({**BASIC, "train": {"itres": 3}}, "train: 'itres' is no setting. Did you mean 'iters'"),
    ({**BASIC, "train": {"iters": "many"}}, "iters='many' is not legal; it is a whole number"),
    ({**BASIC, "train": {"optimizer": "adamv"}}, "adamw"),
    ({**BASIC, "train": [1]}, "train holds \\[1\\]"),
    ({**BASIC, "train": False}, "train holds False"),
    ({**BASIC, "adapter": {"rnak": 3}}, "adapter: 'rnak' is no setting. Did you mean 'rank'"),
    ({**BASIC, "adapter": {"rank": 0}}, "rank=0 is not legal"),
    ({**BASIC, "adapter": {"alpha": 8, "scale": 2.0}}, "alpha and scale"),
    ({**BASIC, "adapter": {"seed": "x"}}, "adapter.seed='x'"),
    ({**BASIC, "adapter": {"seed": -1}}, "adapter.seed=-1"),
    ({**BASIC, "adapter": "no-such-adapter"}, "no-such-adapter"),
    ({**BASIC, "adapter": ""}, "adapter"),
    ({**BASIC, "quantize": {"bits": 7}}, "bits=7 is not legal"),
    ({**BASIC, "quantize": {"mode": "afine"}}, "affine"),
    ({**BASIC, "quantize": {"mode": ["affine"]}}, "affine"),
    ({**BASIC, "quantize": {"solver": "best"}}, "best"),
    ({**BASIC, "quantize": {"solver": 3}}, "quantize.solver=3"),
    ({**BASIC, "quantize": {"overrides": {"no.layer": None}}}, "no.layer"),
    (
        {**BASIC, "quantize": {"overrides": {"lm_head": {"bit": 4}}}},
        "quantize.overrides.lm_head: 'bit' is no setting",
    ),
    ({**BASIC, "quantize": {"overrides": 4}}, "quantize.overrides holds 4"),
    ({**BASIC, "model": 3}, "model=3 is not legal"),
    ({**BASIC, "model": "no-such-model"}, "no-such-model"),
    ({**BASIC, "data": "no-such-rows.jsonl"}, "no-such-rows.jsonl"),
    ({**BASIC, "val": "no-such-rows.jsonl"}, "no-such-rows.jsonl"),
    ({**BASIC, "val": 1.5}, "1.5 of 30 rows cannot be held out"),
    ({**BASIC, "val": True}, "val=True is not legal"),
    ({**BASIC, "prompts": [1]}, "prompts=1 is not legal"),
    ({**BASIC, "prompts": {"a": 1}}, "list of texts"),
    ({**BASIC, "fine_tune_type": "lora", "iters": 3}, "word of mlx_lm.lora's recipes"),
]


@pytest.mark.parametrize(("content", "says"), BAD)
def test_what_a_file_says_wrong_is_refused_and_nothing_is_written(
    content, says, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "x.yaml").write_text(
        content if isinstance(content, str) else yaml.safe_dump(content)
    )
    code, said, errors = run("x.yaml")
    assert code == 1 and said == ""
    assert re.search(says, errors), errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "x.yaml"]


def test_rows_of_another_run_cannot_be_split_again_and_a_folder_without_checkpoint_is_refused(
    notebook, tmp_path
):
    code, _, errors = run(written(notebook, tmp_path / "out", val=3))
    assert code == 1 and "that run's folder says which rows are held out" in errors
    facts, rows, held = run_folder.read(notebook[2] / "made")
    run_folder.write(tmp_path / "empty", facts, rows, held)
    code, _, errors = run(tmp_path / "empty")
    assert code == 1 and "holds no checkpoint that opens" in errors


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["--help"]])
def test_other_arguments_get_the_usage(arguments):
    err = io.StringIO()
    assert main(arguments, io.StringIO(), err) == 2 and err.getvalue().startswith("usage: ")
