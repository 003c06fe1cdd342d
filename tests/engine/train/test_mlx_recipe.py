"""Recipes for stock mlx-lm: it reads them with its own code, runs them, and nothing of the run is left unsaid."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields

import mlx.core as mx
import pytest
import yaml

import qlab
from qlab.core.config.quant import QuantConfig
from qlab.core.train.schedule import learning_rate
from qlab.core.config.lora import LoRAConfig
from qlab.core.config.train import TrainConfig
from qlab.engine.train import mlx_recipe as recipe
from qlab.engine.adapt.files import load_adapter
from qlab.runtime.job import mlx_call
from qlab.engine.train.mlx_recipe import MlxRecipe
from qlab.engine.models.skeleton import describe
from qlab.errors import ConfigError
from tests.tiny import on_mlx, quantized, tiny


def spec_of(storage: QuantConfig | None = None):
    module, spec = tiny()
    return mlx_call(describe, quantized(module, spec, storage), "tiny")


def to_yaml(model, spec, lora, train, data, **more) -> str:
    """Return the recipe of a run."""
    return recipe.to_yaml(
        MlxRecipe(model=model, spec=spec, lora=lora, train=train, data=data, **more)
    )


def read(text: str) -> dict:
    """Read a recipe as ``mlx_lm.lora`` does."""
    from mlx_lm.lora import CONFIG_DEFAULTS, yaml_loader

    held = yaml.load(text, yaml_loader)
    known = {*CONFIG_DEFAULTS, "adapter_path", "resume_adapter_file"}
    assert held.keys() <= known, "mlx-lm passes over words that it does not know"
    return {**CONFIG_DEFAULTS, **held}


def header(text: str) -> str:
    return " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))


@on_mlx
def test_settings_are_said_in_mlx_lms_words():
    lora = LoRAConfig(rank=4, scale=5.0, dropout=0.1, num_layers=2, keys=("q_proj", "v_proj"))
    train = TrainConfig(
        iters=40,
        batch_size=2,
        max_seq_length=256,
        learning_rate=1e-5,
        weight_decay=0.1,
        seed=3,
        steps_per_eval=7,
    )
    held = read(to_yaml("base", spec_of(), lora, train, "data", adapter_path="out"))
    assert held["lora_parameters"] == {
        "rank": 4,
        "scale": 5.0,
        "dropout": 0.1,
        "keys": ["self_attn.q_proj", "self_attn.v_proj"],
    }
    assert (held["num_layers"], held["fine_tune_type"], held["adapter_path"]) == (2, "lora", "out")
    assert (held["iters"], held["batch_size"], held["max_seq_length"], held["seed"]) == (
        40,
        2,
        256,
        3,
    )
    assert held["learning_rate"] == 1e-5 and held["lr_schedule"] is None
    assert held["optimizer_config"]["adamw"] == {"bias_correction": True, "weight_decay": 0.1}
    assert (held["steps_per_eval"], held["save_every"], held["mask_prompt"]) == (7, 100, True)
    assert (
        read(to_yaml("base", spec_of(), lora, train, "data", rows="text"))["mask_prompt"] is False
    )


@on_mlx
def test_counts_of_optimizer_steps_become_counts_of_batches():
    train = TrainConfig(iters=10, grad_accumulation_steps=4, steps_per_save=5, steps_per_eval=2)
    held = read(to_yaml("base", spec_of(), LoRAConfig(rank=4), train, "data"))
    assert (
        held["iters"],
        held["save_every"],
        held["steps_per_eval"],
        held["steps_per_report"],
    ) == (40, 20, 8, 4)
    held = read(
        to_yaml("base", spec_of(), LoRAConfig(rank=4), TrainConfig(epochs=2), "data", iters=30)
    )
    assert held["iters"] == 30


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 5])
@on_mlx
def test_the_learning_rate_of_every_step_is_the_same_but_for_the_step_that_is_named(
    schedule, warmup
):
    from mlx_lm.tuner.utils import build_schedule

    train = TrainConfig(iters=20, learning_rate=2e-3, lr_schedule=schedule, warmup=warmup)
    text = to_yaml("base", spec_of(), LoRAConfig(rank=4), train, "data")
    said = read(text)["lr_schedule"]
    rate = build_schedule(said) if said else lambda _: train.learning_rate
    behind = bool(warmup) and schedule != "constant"
    assert ("one step behind" in header(text)) == behind
    for done in range(20):
        wanted = learning_rate(
            train, 2e-3, max(done - 1, warmup) if behind and done > warmup else done, 20
        )
        assert float(rate(mx.array(done))) == pytest.approx(wanted, rel=1e-4, abs=1e-9)


@on_mlx
def test_nothing_of_a_run_is_left_unsaid():
    assert {field.name for field in fields(TrainConfig)} == recipe.WRITTEN | recipe.NAMED
    train = TrainConfig(
        max_grad_norm=0.7,
        pack=True,
        loss_chunk=77,
        early_stop=3,
        grad_accumulation_steps=2,
        optimizer="adamw8bit",
        warmup=2,
        lr_schedule="cosine",
        grad_checkpoint=True,
    )
    lora = LoRAConfig(rank=4, dtype="bfloat16", rslora=True, init="qera", dropout=0.1)
    words = header(to_yaml("base", spec_of(), lora, train, "data"))
    for named in (
        "padding token",
        "no prefix",
        "max_grad_norm=0.7",
        "pack=True",
        "loss_chunk=77",
        "early_stop=3",
        "means of batches",
        "no 'adamw8bit'",
        "one step behind",
        "bfloat16",
        "scale=2.0",
        "init='qera'",
        "on_nonfinite='skip'",
        "tenth",
        "drops other inputs",
    ):
        assert named in words, named
    plain = header(
        to_yaml(
            "base",
            spec_of(),
            LoRAConfig(rank=4),
            TrainConfig(max_grad_norm=0, loss_chunk=0),
            "data",
        )
    )
    for absent in ("clipped", "logits", "packed", "behind", "8bit", "rslora"):
        assert absent not in plain, absent
    assert "starts from a.safetensors" in header(
        to_yaml("b", spec_of(), lora, train, "d", resume_adapter_file="a.safetensors")
    )


@on_mlx
def test_what_mlx_lm_cannot_do_is_refused_with_the_reason():
    for storage, lora, train, words in [
        (QuantConfig("nf4"), {}, {}, "cannot read the base"),
        (QuantConfig("affine", 3), {"kind": "dora"}, {}, "3-bit"),
        (None, {}, {"optimizer": "lion"}, "no optimizer 'lion'"),
        (None, {}, {"epochs": 1}, "give iters="),
    ]:
        with pytest.raises(ConfigError, match=words):
            to_yaml(
                "base", spec_of(storage), LoRAConfig(rank=4, **lora), TrainConfig(**train), "data"
            )
    for rows, words in (("poems", "rows='poems'"), ("mixed", "what the first one is")):
        with pytest.raises(ConfigError, match=words):
            to_yaml("base", spec_of(), LoRAConfig(rank=4), TrainConfig(), "data", rows=rows)


@on_mlx
def test_every_optimizer_on_the_shelf_can_be_said_and_made_or_is_refused():
    import mlx.optimizers as optim

    from qlab import registry

    for name in registry.shelf("optimizers"):
        try:
            held = read(
                to_yaml(
                    "base",
                    spec_of(),
                    LoRAConfig(rank=4),
                    TrainConfig(optimizer=name, weight_decay=0.5),
                    "data",
                )
            )
        except ConfigError:
            continue
        classes = {"adamw": optim.AdamW, "adafactor": optim.Adafactor, "muon": optim.Muon}
        theirs = classes[held["optimizer"]](
            learning_rate=1e-3, **held["optimizer_config"][held["optimizer"]]
        )
        ours = registry.get("optimizers", name).make(1e-3, 0.5)
        for setting in (
            "weight_decay",
            "bias_correction",
            "relative_step",
            "scale_parameter",
            "momentum",
            "nesterov",
        ):
            if hasattr(ours, setting):
                assert getattr(ours, setting) == getattr(theirs, setting), (name, setting)


def small_base(folder):
    """Save a 4-bit model so small that mlx-lm's own kernels on a CPU are quick; it speaks the demo model's tokens."""
    from qlab.engine.io.save import save
    from qlab.engine.models.skeleton import skeleton

    demo = qlab.load("demo")
    small = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "head_dim": 16,
        "torch_dtype": "float32",
    }
    config = {**demo.config, **small}

    def make():
        module = skeleton(config)
        mx.eval(module.parameters())
        made = quantized(module, describe(module, "small"), QuantConfig("affine", 4))
        save(folder, made, demo.tokenizer, config, None)
        return describe(made, "small")

    return mlx_call(make)


def test_stock_mlx_lm_runs_the_recipe_and_qlab_reads_what_it_trained(tmp_path):
    spec = small_base(tmp_path / "base")
    (tmp_path / "data").mkdir()
    for name in ("train", "valid"):
        rows = [json.dumps({"text": f"Row {i} of a short text about lists."}) for i in range(2)]
        (tmp_path / "data" / f"{name}.jsonl").write_text("\n".join(rows))
    lora = LoRAConfig(rank=2, keys=("q_proj", "*.1.mlp.up_proj"))
    train = TrainConfig(
        iters=2,
        batch_size=2,
        max_seq_length=16,
        warmup=1,
        lr_schedule="cosine",
        steps_per_save=1,
        val_batches=1,
    )
    places = {"data": str(tmp_path / "data"), "adapter_path": str(tmp_path / "out")}
    (tmp_path / "run.yaml").write_text(
        to_yaml(str(tmp_path / "base"), spec, lora, train, rows="text", **places)
    )
    command = [sys.executable, "-m", "mlx_lm", "lora", "--config", str(tmp_path / "run.yaml")]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found, parameters, _ = mlx_call(load_adapter, tmp_path / "out", spec)
    assert found.targets(spec) == lora.targets(spec) and (found.rank, found.scale) == (2, 2.0)
    trained = [array for key, array in parameters.items() if key.endswith("lora_b")]
    assert mlx_call(lambda: all(mx.any(array).item() for array in trained))
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["iters"] == 2
