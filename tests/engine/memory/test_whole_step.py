"""A traced step needs what the real step needs: for every scheme, adapter, optimizer and way of taking the step."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from qlab import registry
from qlab.core.config.quant import QuantConfig
from qlab.core.config.quant import QuantPlan
from qlab.core.memory.setup import Setup
from qlab.core.config.lora import LoRAConfig
from qlab.core.config.train import TrainConfig
from qlab.engine.memory.forecast import Forecast
from qlab.engine.memory.measure import measured_peak
from qlab.engine.models.skeleton import describe
from qlab.engine.models.skeleton import skeleton
from qlab.engine.models.lazy_storage import stored
from tests.tiny import on_mlx, quantized, settings, tiny

TRAIN = dict(batch_size=3, max_seq_length=300, loss_chunk=256)
SCHEMES = [QuantConfig(name) for name in registry.shelf("schemes")]
WAYS = pytest.mark.parametrize("checkpoint", [True, False], ids=["stepped", "whole"])
OTHERS = {
    "dropout": (dict(dropout=0.1), {}),
    "accumulation": ({}, dict(grad_accumulation_steps=2)),
    "no chunks": ({}, dict(loss_chunk=0)),
    "few layers": (dict(num_layers=1), {}),
    "one layer kind": (dict(keys=("q_proj",)), {}),
    "bfloat16 adapter": (dict(dtype="bfloat16"), {}),
    "dora": (dict(kind="dora"), {}),
    "packed": ({}, dict(pack=True)),
    **{name: ({}, dict(optimizer=name)) for name in registry.shelf("optimizers")},
}


def assert_close(module, spec, setup, storage=None, low=1.04):
    """The trace is never far below the real peak; above it only as far as the device happens to keep up."""
    found = sum(Forecast(module, "tiny", None, True).by_trace(setup)[1].values())
    real = max(measured_peak(quantized(module, spec, storage), setup) for _ in range(2))
    assert real / low < found < real * 1.25, (
        found / real - 1
    )  # tiny products let the device keep up


@WAYS
@pytest.mark.parametrize("storage", [None, *SCHEMES], ids=lambda c: c.mode if c else "16-bit")
@on_mlx
def test_every_scheme(storage, checkpoint):
    module, spec = tiny()
    plan = QuantPlan(storage) if storage else None
    setup = Setup(plan, LoRAConfig(rank=4), TrainConfig(**TRAIN, grad_checkpoint=checkpoint))
    assert_close(module, spec, setup, storage)


@WAYS
@pytest.mark.parametrize("name", OTHERS)
@on_mlx
def test_every_other_setting(name, checkpoint):
    module, spec = tiny()
    lora, train = OTHERS[name]
    train = TrainConfig(**{**TRAIN, "grad_checkpoint": checkpoint, **train})
    low = 1.08 if name == "dora" else 1.04  # see docs/guide/memory_accuracy.md
    assert_close(module, spec, Setup(None, LoRAConfig(**{"rank": 8, **lora}), train), low=low)


@WAYS
@pytest.mark.parametrize("tied", [True, False])
@on_mlx
def test_adapters_on_embedding_and_head(tied, checkpoint):
    module, spec = tiny(tie_word_embeddings=tied)
    keys = ("embed_tokens", "q_proj") if tied else ("lm_head", "embed_tokens", "q_proj")
    setup = Setup(
        None, LoRAConfig(rank=8, keys=keys), TrainConfig(**TRAIN, grad_checkpoint=checkpoint)
    )
    assert_close(module, spec, setup)


@WAYS
@on_mlx
def test_a_trace_computes_nothing_and_leaves_the_model_as_it_was(checkpoint):
    module = skeleton(
        settings("llama", hidden_size=2048, vocab_size=50_000, intermediate_size=4096)
    )
    before = [(path, array.shape) for path, array in tree_flatten(module.parameters())]
    mx.clear_cache()
    mx.reset_peak_memory()
    forecast = Forecast(module, "large")
    setup = Setup(
        QuantPlan(QuantConfig()), LoRAConfig(), TrainConfig(**TRAIN, grad_checkpoint=checkpoint)
    )
    found = sum(forecast.by_trace(setup)[1].values())
    assert found > 1e8 and mx.get_peak_memory() - mx.get_active_memory() < 5e6
    assert [(path, array.shape) for path, array in tree_flatten(module.parameters())] == before
    assert sum(forecast.by_trace(setup)[1].values()) == found


@pytest.mark.parametrize("config", SCHEMES, ids=lambda c: c.mode)
@on_mlx
def test_a_structure_has_the_bytes_that_are_really_stored(config):
    module, spec = tiny()
    made = stored(module, {layer.path: config for layer in spec.layers})
    real = quantized(module, spec, config)
    assert describe(made, "").nbytes == describe(real, "").nbytes
    assert describe(made, "").nbytes == sum(a.nbytes for _, a in tree_flatten(real.parameters()))
