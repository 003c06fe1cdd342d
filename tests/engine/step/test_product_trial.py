"""The base's product is chosen by trial and remembered; the numbers do not turn on it."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import pytest

from qlab.core.config.quant import QuantConfig
from qlab.core.config.lora import LoRAConfig
from qlab.engine.step import product_trial as trial
from qlab.engine.models.skeleton import describe
from qlab.engine.step.product_trial import choose_compute
from tests.engine.step.test_whole import WHOLE, assert_same, numbers
from tests.tiny import on_mlx, quantized, tiny


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(trial, "cache_folder", lambda: tmp_path)
    return tmp_path


@pytest.fixture
def raced(monkeypatch):
    """Trials with times that the test gives; records the shapes tried."""
    made: list = []
    times = {"kernel": 1.0, "dequantize": 2.0}

    def race(layer, shape, tokens, dtype, budget_s):
        made.append(shape)
        return trial.Race(times["kernel"], times["dequantize"], False)

    monkeypatch.setattr(trial, "_race", race)
    return made, times


def base(mode: str | None = "affine"):
    module, spec = tiny()
    module = quantized(module, spec, QuantConfig(mode) if mode else None)
    return module, describe(module, "tiny")


@on_mlx
def test_a_real_trial_is_short_and_its_answer_is_remembered(folder):
    given = base()
    start = time.perf_counter()
    first, notes = choose_compute(*given, 64)
    assert time.perf_counter() - start < 4
    assert "tried now" in notes[0] and "times as fast" in notes[0]
    second, notes = choose_compute(*given, 64)
    assert second == first and "remembered" in notes[0]
    assert len(json.loads((folder / "products.json").read_text())) == len(
        {x.shape for x in given[1].layers if x.block is not None}
    )


@pytest.mark.parametrize(("kernel", "dequantize"), [(1.0, 2.0), (2.0, 1.0)])
def test_the_faster_one_wins(raced, kernel, dequantize):
    raced[1].update(kernel=kernel, dequantize=dequantize)
    compute, notes = on_mlx(choose_compute)(*base(), 64)
    assert compute.dequantize == (dequantize < kernel) and "2.0 times" in notes[0]


def test_each_shape_is_tried_once_for_a_power_of_two_of_tokens(raced):
    given = base()
    for tokens in (33, 50, 64):
        on_mlx(choose_compute)(*given, tokens)
    assert len(raced[0]) == len(set(raced[0])) == 4
    on_mlx(choose_compute)(*given, 65)
    assert len(raced[0]) == 8


def test_what_was_found_without_a_fast_blas_does_not_count_with_one(raced, monkeypatch):
    given = base()
    on_mlx(choose_compute)(*given, 64)
    monkeypatch.setattr(trial.blas, "status", lambda: trial.blas.BlasStatus(None, "turned off"))
    on_mlx(choose_compute)(*given, 64)
    assert len(raced[0]) == 8 or not trial.blas.status().loaded


@pytest.mark.parametrize("text", ["", "{", "[]", '{"x": 1}'])
def test_a_broken_cache_is_no_cache(raced, folder, text):
    (folder / "products.json").write_text(text)
    assert on_mlx(choose_compute)(*base(), 64)[1]
    assert len(raced[0]) == 4


def test_a_broken_entry_is_tried_again(raced, folder):
    given = base()
    on_mlx(choose_compute)(*given, 64)
    known = json.loads((folder / "products.json").read_text())
    (folder / "products.json").write_text(json.dumps({key: ["fast"] for key in known}))
    on_mlx(choose_compute)(*given, 64)
    assert len(raced[0]) == 8


def test_a_folder_that_cannot_be_written_costs_only_the_memory(raced, monkeypatch):
    def refuse():
        raise OSError("read-only")

    monkeypatch.setattr(trial, "cache_folder", refuse)
    assert on_mlx(choose_compute)(*base(), 64)[0].dequantize is False


@pytest.mark.parametrize("mode", ["nf4", None])
def test_a_storage_without_kernel_needs_no_trial(raced, mode):
    compute, notes = on_mlx(choose_compute)(*base(mode), 64)
    assert compute.dequantize and raced[0] == [] and bool(notes) == (mode is not None)


@on_mlx
def test_a_kernel_with_other_numbers_is_never_used_however_fast(monkeypatch):
    given = base()
    monkeypatch.setattr(
        nn.QuantizedLinear,
        "__call__",
        lambda self, x: mx.zeros((*x.shape[:-1], self.weight.shape[0]), x.dtype),
    )
    for _ in range(2):  # found, and remembered
        compute, notes = choose_compute(*given, 64)
        assert compute.dequantize and "other numbers" in notes[0]


@on_mlx
def test_loss_and_gradients_do_not_turn_on_the_choice():
    (module, spec), lora = base(), LoRAConfig(rank=4)
    chosen, _ = choose_compute(module, spec, 64)
    ways = [chosen, *(replace(chosen, dequantize=dequantize) for dequantize in (False, True))]
    found = [numbers(module, spec, lora, WHOLE, compute)[0] for compute in ways]
    mx.eval(found)
    for other in found[1:]:
        assert_same(other, found[0])
