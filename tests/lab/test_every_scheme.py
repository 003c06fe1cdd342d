"""Every scheme on the shelf trains, however its weights came: estimated, resumed, fused, exported."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest

import qlab
from qlab import registry
from qlab.core.config.quant import QuantConfig
from qlab.engine.io.save import save
from qlab.runtime.job import mlx_call
from tests.tiny import settings, tiny

CONFIGS = {name: QuantConfig(name) for name in registry.shelf("schemes")}
ROWS = [{"text": f"Row {i} of a short text about lists."} for i in range(4)]
# each scheme and way meets a kind of adapter and of step; over a scheme's ways all four come up
KINDS = cycle([("lora", False), ("dora", True), ("dora", False), ("lora", True)])
WAYS = ["quantizer", "quantized", "reloaded", "stock folder"]
CASES = [
    (scheme, way, *next(KINDS))
    for scheme, config in CONFIGS.items()
    for way in WAYS
    if way != "stock folder" or config.scheme.stock_mode
]
TRAIN = qlab.TrainConfig(batch_size=2, max_seq_length=64)
CHANGES = {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


def write_dense(folder: Path, name: str) -> Path:
    """Save a model of two blocks that speaks the demo model's tokens."""
    demo = qlab.load("demo")
    module, _ = tiny(name, **CHANGES)
    mlx_call(save, folder, module, demo.tokenizer, settings(name, **CHANGES), None)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return write_dense(tmp_path_factory.mktemp("dense") / "llama", "llama")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return write_dense(tmp_path_factory.mktemp("mixture") / "qwen3_moe", "qwen3_moe")


def base_of(way: str, config: QuantConfig, dense: Path, folder: Path):
    """Return what an adapter is made for: a quantizer, or a model that is quantized."""
    if way == "stock folder":
        stored = {
            "q_bits": config.bits,
            "q_group_size": config.group_size,
            "q_mode": config.scheme.stock_mode,
        }
        mlx_call(mlx_lm.convert, str(dense), str(folder), quantize=True, **stored)
        return qlab.load(str(folder))
    quantizer = qlab.Quantizer(
        qlab.load(str(dense)), mode=config.mode, bits=config.bits, group_size=config.group_size
    )
    if way == "quantizer":
        return quantizer
    model = quantizer.quantize()
    if way == "quantized":
        return model
    model.save(folder)
    return qlab.load(str(folder))


def is_finite(model) -> bool:
    """Whether the logits of a model are numbers."""

    def check() -> bool:
        logits = model.module(mx.array([[1, 5, 9, 40]]))
        return mx.isfinite(logits).all().item()

    return mlx_call(check)


def check_trains(base, kind: str, checkpoints: bool, folder: Path) -> None:
    """Estimate, train, resume, export and fuse."""
    adapter = qlab.Adapter(base, rank=2, kind=kind)
    config = qlab.TrainConfig(
        iters=2,
        batch_size=2,
        max_seq_length=32,
        learning_rate=1e-2,
        grad_checkpoint=checkpoints,
        steps_per_save=1,
    )
    trainer = qlab.Trainer(adapter, ROWS, config, path=folder / "run")
    assert trainer.estimate.total_nbytes > 0
    report = trainer.run()
    assert report.loss > 0
    assert report.steps == 2
    resumed = qlab.Trainer.load(folder / "run" / "step-000001", adapter)
    assert resumed.run().loss == report.loss
    adapter.save(folder / "adapter")
    assert (folder / "adapter" / "adapters.safetensors").exists()
    assert is_finite(adapter.fuse())


@pytest.mark.parametrize(("scheme", "way", "kind", "checkpoints"), CASES)
def test_every_scheme_trains_however_it_came(scheme, way, kind, checkpoints, dense, tmp_path):
    base = base_of(way, CONFIGS[scheme], dense, tmp_path / "base")
    check_trains(base, kind, checkpoints, tmp_path)


@pytest.mark.parametrize("scheme", CONFIGS)
def test_experts_of_every_scheme_train(scheme, mixture, tmp_path):
    base = base_of("reloaded", CONFIGS[scheme], mixture, tmp_path / "base")
    check_trains(base, "lora", False, tmp_path)


@pytest.mark.parametrize("scheme", CONFIGS)
def test_the_estimate_is_the_same_however_the_weights_came(scheme, dense, tmp_path):
    totals = set()
    for way in ("quantizer", "reloaded"):
        base = base_of(way, CONFIGS[scheme], dense, tmp_path / "base")
        adapter = qlab.Adapter(base, rank=2)
        totals.add(qlab.estimate(adapter, train=TRAIN).total_nbytes)
    assert max(totals) <= 1.01 * min(totals)
