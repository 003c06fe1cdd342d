"""Runs that cannot be taken up again: each says why, and adapter and folder stay as they were."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import pytest

import qlab
from qlab.runtime.job import mlx_call
from qlab.errors import BusyError
from qlab.errors import ConfigError
from qlab.errors import LoadError
from qlab.errors import QlabError

ROWS = [
    {"text": f"Row {n}: the {word} of the house."}
    for n, word in enumerate(["tall", "kind", "odd"] * 4)
]
SMALL = {"rank": 2, "num_layers": 1, "keys": ["q_proj"]}
LAST = "step-000002"


@pytest.fixture(scope="module")
def base(demo):
    q = qlab.Quantizer(demo, bits=4)
    yield q.quantize()
    q.close()


@pytest.fixture(scope="module")
def made(base, tmp_path_factory):
    """The folder of a run with one checkpoint."""
    path = tmp_path_factory.mktemp("made") / "run"
    config = qlab.TrainConfig(iters=2, batch_size=2, max_seq_length=16)
    qlab.Trainer(qlab.Adapter(base, **SMALL), ROWS, config, val=0, path=path).run()
    return path


def files(path):
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def cut(name):
    return lambda run: (run / LAST / name).write_bytes((run / LAST / name).read_bytes()[:-9])


def gone(name):
    return lambda run: (run / name).unlink()


def edit(name, **changes):
    def change(run):
        found = json.loads((run / name).read_text())
        kept = {key: value for key, value in {**found, **changes}.items() if value is not gone}
        (run / name).write_text(json.dumps(kept))

    return change


def nan(run):
    file = str(run / LAST / "adapters.safetensors")
    mlx_call(
        lambda: mx.save_safetensors(
            file, {name: array * mx.nan for name, array in mx.load(file).items()}
        )
    )


SPOILT = {
    "no checkpoint": (
        lambda run: shutil.rmtree(run / LAST),
        LoadError,
        "holds no checkpoint that opens",
    ),
    "no adapter": (gone(f"{LAST}/adapters.safetensors"), LoadError, "1 are broken"),
    "no optimizer": (gone(f"{LAST}/optimizer.safetensors"), LoadError, "1 are broken"),
    "no state": (gone(f"{LAST}/state.json"), LoadError, "1 are broken"),
    "adapter cut short": (cut("adapters.safetensors"), LoadError, "1 are broken"),
    "optimizer cut short": (cut("optimizer.safetensors"), LoadError, "1 are broken"),
    "state cut short": (cut("state.json"), LoadError, "1 are broken"),
    "state lacks the step": (edit(f"{LAST}/state.json", step=gone), LoadError, "1 are broken"),
    "history of another kind": (
        edit(f"{LAST}/state.json", history=[{"step": 1}]),
        LoadError,
        "1 are broken",
    ),
    "adapter of NaN": (nan, QlabError, "hold NaN or infinity"),
    "no rows": (gone("rows.npz"), LoadError, "it has no rows.npz"),
    "no settings": (gone("run.json"), LoadError, "it has no run.json"),
    "settings cut short": (
        lambda run: (run / "run.json").write_text('{"source": '),
        LoadError,
        "cannot be read",
    ),
    "settings lack the adapter": (edit("run.json", lora=gone), LoadError, "cannot be read"),
    "a setting that is not legal": (
        edit("run.json", train={"iters": 0}),
        QlabError,
        "iters=0 is not legal",
    ),
    "a setting that nobody knows": (edit("run.json", train={"steps": 3}), LoadError, "steps"),
    "another base": (edit("run.json", base="0f"), ConfigError, "is not the base that the run"),
    "another rank": (
        edit("run.json", lora={**SMALL, "rank": 4}),
        ConfigError,
        "has rank=2, and the run in .* rank=4",
    ),
    "another scale": (
        edit("run.json", lora={**SMALL, "scale": 3.0}),
        ConfigError,
        "has scale=2.0, and the run in .* scale=3.0",
    ),
    "other keys": (edit("run.json", lora={**SMALL, "keys": ["v_proj"]}), ConfigError, "has keys="),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_run_is_refused_and_nothing_changes(name, base, made, tmp_path):
    spoil, error, says = SPOILT[name]
    run = tmp_path / "run"
    shutil.copytree(made, run)
    spoil(run)
    adapter = qlab.Adapter(base, **SMALL)
    before, parameters, config = files(run), adapter.parameters, adapter.config
    with pytest.raises(error, match=says):
        qlab.Trainer.load(run, adapter)
    assert files(run) == before
    assert adapter.config == config and not adapter.trained
    assert all(adapter.parameters[path] is array for path, array in parameters.items())


@pytest.mark.parametrize(
    "name", ["no adapter", "optimizer cut short", "state cut short", "history of another kind"]
)
def test_a_spoilt_checkpoint_that_is_named_says_what_is_wrong_with_it(name, base, made, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(made, run)
    SPOILT[name][0](run)
    with pytest.raises(LoadError, match=r"has no adapters|cut short|cannot be read"):
        qlab.Trainer.load(run / LAST, qlab.Adapter(base, **SMALL))


def test_a_model_that_is_gone_and_an_adapter_in_use_are_refused(base, made, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(made, run)
    for source, error in (("", ConfigError), (str(tmp_path / "gone"), LoadError)):
        edit("run.json", source=source)(run)
        with pytest.raises(error):
            qlab.Trainer.load(run)
    adapter = qlab.Adapter(base, **SMALL)
    other = qlab.Trainer(
        adapter,
        ROWS,
        qlab.TrainConfig(iters=300, batch_size=1, max_seq_length=8),
        val=0,
        path=tmp_path / "x",
    )
    other.start()
    with pytest.raises(BusyError, match="stop it first"):
        qlab.Trainer.load(made, adapter)
    other.stop()
    other.wait()


def test_the_run_as_it_was_is_taken_up(base, made):
    assert (
        qlab.Trainer.load(made, qlab.Adapter(base, **SMALL)).adapter.origin == f"checkpoint {LAST}"
    )


def test_the_old_spelling_still_loads_a_run_and_warns(base, made):
    with pytest.warns(DeprecationWarning, match=r"use Trainer\.load\(path\)") as seen:
        trainer = qlab.Trainer.resume(made, qlab.Adapter(base, **SMALL))
    assert trainer.adapter.origin == f"checkpoint {LAST}" and seen[0].filename == __file__
