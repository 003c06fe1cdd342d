"""Opening models: every failure is one clear sentence."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import pytest

import qlab
from qlab.runtime.job import mlx_call
from qlab.runtime.paths import ASSETS
from qlab.errors import LoadError

DEMO = ASSETS / "demo"


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(DEMO, tmp_path / "m")
    return tmp_path / "m"


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def refuses(source, words):
    with pytest.raises(LoadError, match=words):
        qlab.load(source)


def test_local_folder_opens_like_the_demo(folder):
    assert qlab.load(folder).spec.size == qlab.load("demo").spec.size == 5_247_232


def test_missing_source_is_said_and_the_nearest_named(folder):
    refuses("demmo", "Did you mean 'demo'")
    refuses(str(folder.parent / "n"), "no model at")
    refuses(str(folder / "config.json"), "is a file")


def test_hub_that_cannot_be_reached_is_said(monkeypatch):
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda *a, **k: (_ for _ in ()).throw(OSError("no route")),
    )
    refuses("owner/name", "hub could not be reached")


def test_folder_that_is_no_model_is_said(folder):
    (folder / "model.safetensors").rename(folder / "other.bin")
    refuses(folder, "no weights")
    (folder / "config.json").write_text("{")
    refuses(folder, "not JSON")
    (folder / "config.json").unlink()
    refuses(folder, "no config.json")


def test_truncated_weights_are_named(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    refuses(folder, "model.safetensors is cut short")
    (folder / "model.safetensors").write_bytes(b"rubbish" * 100)
    refuses(folder, "not a safetensors file")


def test_unknown_architecture_gets_the_nearest(folder):
    edit(folder, model_type="lama")
    refuses(folder, "'lama'.*Did you mean 'llama'")


def test_weights_that_do_not_fit_the_config_are_said(folder):
    edit(folder, num_hidden_layers=9)
    refuses(folder, "do not fit")


def test_missing_tokenizer_is_said(folder):
    (folder / "tokenizer.json").unlink()
    refuses(folder, "no tokenizer")


def test_demo_keeps_its_promises():
    assert (DEMO / "model.safetensors").stat().st_size <= 12e6
    model = qlab.load("demo")
    assert model.spec.size <= 8e6
    assert all(n % 128 == 0 for layer in model.spec.layers for n in layer.shape)
    assert mlx_call(
        lambda: all(
            mx.isfinite(v).all().item() for v in mx.load(str(DEMO / "model.safetensors")).values()
        )
    )
    known = set((ASSETS / "calibration.txt").read_text().split()) | set(
        (ASSETS / "heldout.txt").read_text().split()
    )
    words = model.generate("She was", max_tokens=60).split()[:-1]
    assert sum(word in known for word in words) >= 0.9 * len(words)
