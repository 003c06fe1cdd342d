"""Formulas give what the simulation of the whole step gives, at sizes and depths that they were not read at."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from qlab.core.graph.sizes import CHUNKS
from qlab.core.graph.sizes import QUANTITIES
from qlab.core.graph.sizes import chunks
from qlab.core.graph.sizes import references
from qlab.core.graph.sizes import sizes
from qlab.core.memory.setup import Setup
from qlab.core.config.lora import LoRAConfig
from qlab.core.config.train import TrainConfig
from qlab.engine.memory import formulas, step_graphs, trace
from qlab.engine.memory.forecast import Forecast
from tests.tiny import on_mlx, tiny


def test_quantities_follow_from_settings():
    assert dict(zip(QUANTITIES, sizes(2, 257, 8, 100), strict=True)) == {
        "batch": 2,
        "tokens": 256,
        "length": 257,
        "rank": 8,
        "chunk": 100,
        "rest": 12,
    }
    assert sizes(1, 65, 8, 512)[4:] == sizes(1, 65, 8, 0)[4:] == (1, 1)  # one chunk is no chunk


def test_more_chunks_than_a_few_are_a_few():
    assert [chunks(1, n * 10 + 1, 10) for n in (1, 2, 4, 5, 900)] == [1, 2, 4, CHUNKS, CHUNKS]


@pytest.mark.parametrize("tiles", [False, True], ids=["", "tiles"])
@pytest.mark.parametrize("several", [0, 1, 2, CHUNKS])
@pytest.mark.parametrize("widest", [1, 2, 4, 7, 4096])
def test_references_have_the_chunks_and_ranks_that_are_legal(several, widest, tiles):
    for ref in references(several, widest, tiles):
        assert ref.tokens % 128 == 0 or not tiles
        assert 1 <= ref.rank <= widest
        assert chunks(ref.batch, ref.tokens + 1, ref.chunk) == max(several, 1)


@pytest.mark.parametrize("tiles", [False, True])
def test_ratios_of_references_tell_products_apart(tiles):
    one, two = (np.array(ref.sizes, float)[:4] for ref in references(0, 4096, tiles))
    powers = [p for p in itertools.product(range(3), repeat=4) if 0 < sum(p) <= 4]
    found = {round(float(np.prod((two / one) ** p)), 6) for p in powers}
    assert len(found) == len(powers)


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
