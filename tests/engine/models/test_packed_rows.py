"""Packed rows give the loss and the gradients of the rows alone, or the model is refused."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from qlab.core.config.lora import LoRAConfig
from qlab.core.config.train import TrainConfig
from qlab.engine.models.packed_rows import PackedRowsCache
from qlab.nn.frozen import Compute
from qlab.engine.adapt.attach import attach
from qlab.engine.step.choose import make_step
from qlab.errors import UnsupportedError
from qlab.engine.step.protocol import StepBatch
from tests.engine.step.test_whole import assert_same, stirred
from tests.tiny import on_mlx, tiny

LENGTHS = ((5, 7), (9, 3))  # rows of packed rows: one full, and one that leaves two of padding
PACKED = TrainConfig(pack=True, max_seq_length=14, loss_chunk=7)
KEEPERS = [
    "llama",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "cohere2",
    "gpt_oss",
    "mixtral",
    "nanochat",
]


def packed():
    """Return tokens, mask and segments, and the same rows alone."""
    rng = np.random.default_rng(3)
    tokens, mask, segments, alone = (np.zeros((2, 14), np.int32) for _ in range(3)), None, None, []
    tokens, mask, segments = tokens
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for number, length in enumerate(lengths, 1):
            own, counts = rng.integers(0, 97, length), rng.random(length) < 0.7
            counts[0], counts[1] = False, True
            tokens[row, start : start + length], mask[row, start : start + length] = own, counts
            segments[row, start : start + length] = number
            alone.append((mx.array(own)[None], mx.array(counts.astype(np.int32))[None]))
            start += length
    return [mx.array(x) for x in (tokens, mask, segments)], alone


def step_of(name: str, how: str, lora: LoRAConfig):
    module, spec = tiny(name)
    mx.random.seed(5)
    return make_step(
        attach(module, spec, lora, Compute(None, True), how == "stepped"), PACKED, how=how
    )


@pytest.mark.parametrize("how", ["whole", "stepped"])
@pytest.mark.parametrize("name", KEEPERS)
@on_mlx
def test_packed_rows_give_the_sums_of_the_rows_alone(name, how):
    step = step_of(name, how, LoRAConfig(rank=4))
    parameters = stirred(step.parameters)
    (tokens, mask, segments), alone = packed()
    found = step(parameters, StepBatch(tokens, mask, None, segments))
    rows = [step(parameters, StepBatch(*row)) for row in alone]
    expected = rows[0].plus(rows[1]).plus(rows[2]).plus(rows[3])
    assert_same(found, expected)
    assert found.count.item() == expected.count.item()


@pytest.mark.parametrize("name", ["mamba", "lfm2", "mistral3"])
@on_mlx
def test_a_model_that_cannot_keep_rows_apart_is_refused_and_trains_unpacked(name):
    module, spec = tiny(name)
    twin = attach(module, spec, LoRAConfig(rank=4), Compute(None, True), False)
    with pytest.raises(UnsupportedError, match="pack=False"):
        make_step(twin, PACKED)
    assert make_step(twin, replace(PACKED, pack=False)).how == "whole"


@on_mlx
def test_a_model_with_one_mask_for_all_rows_takes_them_one_at_a_time_and_says_so():
    assert any(
        "one at a time" in note for note in step_of("gemma2", "whole", LoRAConfig(rank=4)).notes
    )
    assert not any(
        "one at a time" in note for note in step_of("llama", "whole", LoRAConfig(rank=4)).notes
    )


@on_mlx
def test_the_first_token_of_a_packed_row_is_no_target_even_if_the_mask_says_so():
    step = step_of("llama", "whole", LoRAConfig(rank=4))
    (tokens, mask, segments), _ = packed()
    expected = step(step.parameters, StepBatch(tokens, mask, None, segments))
    mask[0, 5] = 1
    found = step(step.parameters, StepBatch(tokens, mask, None, segments))
    assert found.count.item() == expected.count.item() and found.loss.item() == expected.loss.item()


@on_mlx
def test_a_position_sees_its_own_rows_past_within_the_window():
    mask = PackedRowsCache(mx.array([[1, 1, 1, 2, 2, 0]])).make_mask(6, window_size=2)
    seen = [[0], [0, 1], [1, 2], [3], [3, 4], [5]]
    assert [[j for j in range(6) if mask[0, 0, i, j].item()] for i in range(6)] == seen
