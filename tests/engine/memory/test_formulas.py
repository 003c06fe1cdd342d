"""Formulas give what the simulation of the whole step gives, at sizes and depths that they were not read at."""

from __future__ import annotations

import itertools

import pytest

from qlab.core.config.lora import LoRAConfig
from qlab.core.config.train import TrainConfig
from qlab.core.memory.setup import Setup
from qlab.engine.memory import formulas, step_graphs, trace
from qlab.engine.memory.forecast import Forecast
from tests.tiny import on_mlx, tiny


@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize("name", ["cpu", "cuda"])
@on_mlx
def test_a_formula_of_few_blocks_tells_of_many_blocks_and_other_sizes(
    checkpoint, name, monkeypatch
):
    if name == "cuda":
        for module in (formulas, step_graphs, trace):
            monkeypatch.setattr(module, "backend", lambda: name)
    module, _ = tiny(num_hidden_layers=9)
    forecast = Forecast(module, "tiny", None, True)
    for (batch, length), (rank, count), chunk in itertools.product(
        [(1, 400), (6, 100)], [(2, -1), (16, 5)], [0, 64]
    ):
        train = TrainConfig(
            batch_size=batch, max_seq_length=length, grad_checkpoint=checkpoint, loss_chunk=chunk
        )
        setup = Setup(None, LoRAConfig(rank=rank, num_layers=count), train)
        found, whole = (
            sum(how(setup)[1].values()) for how in (forecast.by_formula, forecast.by_trace)
        )
        assert 0.95 * whole < found < 1.12 * whole, (batch, length, rank, count, chunk)
    assert len(forecast._formulas) <= 6  # most of these are one kind of step


@pytest.mark.parametrize("keys", [("embed_tokens",), ("embed_tokens", "q_proj")])
@pytest.mark.parametrize("kind", ["lora", "dora"])
@on_mlx
def test_an_adapter_on_a_tied_embedding_has_an_estimate_like_any_other(kind, keys):
    module, _ = tiny(tie_word_embeddings=True)
    forecast = Forecast(module, "tiny", None, True)
    for checkpoint, length in itertools.product([False, True], [40, 200]):
        train = TrainConfig(batch_size=2, max_seq_length=length, grad_checkpoint=checkpoint)
        setup = Setup(None, LoRAConfig(rank=4, kind=kind, keys=keys), train)
        found, whole = (
            sum(how(setup)[1].values()) for how in (forecast.by_formula, forecast.by_trace)
        )
        assert 0.95 * whole < found < 1.25 * whole, (checkpoint, length, found, whole)
