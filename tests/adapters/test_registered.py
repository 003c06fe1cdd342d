"""A kind of adapter that is defined in a notebook cell goes everywhere that the kinds on the shelf go."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest

import qlab
from qlab import registry
from qlab.adapters.lora import LoRA, LoRALayer
from qlab.core.config.lora import AdapterKind
from qlab.engine.models.surgery import module_at
from qlab.errors import ConfigError, UnsupportedError
from qlab.runtime.job import mlx_call

ROWS = [f"Row {number} of a text to learn from." for number in range(8)]
PROMPT = "The"


class Halved(LoRA):
    """A subclass of LoRA: half of its change."""

    name = "halved"
    title = "LoRA, but half of it"

    def make(self, base, shape, config):
        layer = super().make(base, shape, config)
        layer.scale = config.scale / 2
        return layer

    def change(self, arrays, weight, config, kind):
        return super().change(arrays, weight, config, kind) / 2


class GainLayer(nn.Module):
    """y = (1 + gain) · base(x), without bias."""

    def __init__(self, base, shape, dtype):
        super().__init__()
        self.base = base
        self.gain = mx.zeros(shape[:-1], getattr(mx, dtype))

    def __call__(self, x):
        y = self.base(x)
        return y + self.gain.astype(y.dtype) * y


class Gain(AdapterKind):
    """A kind that has no factors, as IA³ (Liu et al. 2022, arXiv:2205.05638)."""

    name = "gain"
    title = "a gain for every output"

    def shapes(self, shape, rank, kind="linear"):
        return {"gain": shape[:-1]}

    def make(self, base, shape, config):
        return GainLayer(base, shape, config.dtype)

    def change(self, arrays, weight, config, kind):
        return arrays["gain"][..., None] * weight


class Mute(Gain):
    """A kind that does not say what it adds."""

    name = "mute"
    change = AdapterKind.change


@pytest.fixture(scope="module", autouse=True)
def cell():
    shelf = registry.shelf("adapters")
    before = dict(shelf)
    for kind in (Halved(), Gain(), Mute()):
        assert qlab.register("adapters", kind) is kind
    yield
    shelf.clear()
    shelf.update(before)


@pytest.fixture(scope="module", params=["halved", "gain"])
def trained(request, demo, tmp_path_factory):
    """An adapter of a kind from a cell, after a few steps on a quantized model."""
    base = qlab.Quantizer(demo, bits=4).quantize()
    adapter = qlab.Adapter(base, kind=request.param, rank=2, keys=["q_proj", "v_proj"])
    config = qlab.TrainConfig(iters=3, batch_size=2, max_seq_length=16, learning_rate=1e-2)
    trainer = qlab.Trainer(
        adapter, ROWS, config, val=0, path=tmp_path_factory.mktemp("runs") / request.param
    )
    trainer.run()
    yield adapter
    adapter.close()


def test_a_few_steps_change_every_array(trained):
    assert trained.trained
    assert all(mx.abs(array).max().item() > 0 for array in trained.parameters.values())


def test_its_memory_is_estimated_by_its_shapes(trained):
    estimate = qlab.estimate(trained, train=qlab.TrainConfig(batch_size=1, max_seq_length=64))
    assert estimate.parts["adapter"] == trained.report.nbytes > 0


def test_a_saved_folder_comes_back_in_qlab_and_says_that_mlx_lm_has_no_such_kind(trained, tmp_path):
    saved = trained.save(tmp_path / "a")
    assert f"it has no kind {trained.kind!r}" in saved and saved.opens_in == ("qlab",)
    again = qlab.Adapter.load(tmp_path / "a", trained.base)
    assert again.config == trained.config
    for path, array in trained.parameters.items():
        assert mx.array_equal(again.parameters[path], array).item()


def test_peft_is_refused_by_a_sentence_that_names_the_kind(trained, tmp_path):
    with pytest.raises(ConfigError, match=f"PEFT has no kind {trained.kind!r}; use format='mlx'"):
        trained.save(tmp_path / "a", format="peft")


def test_fused_layers_give_what_the_layers_give_with_the_adapter_beside_them(trained):
    fused = trained.fuse(bits=16).module
    beside = trained.module
    paths = [layer.path for layer in trained.report.layers]

    def largest_difference() -> float:
        worst = 0.0
        for path in paths:
            layer = module_at(beside, path)
            x = mx.random.normal((1, 7, trained.base.spec[path].shape[-1]), key=mx.random.key(4))
            with_adapter = layer(x).astype(mx.float32)
            merged = module_at(fused, path)(x).astype(mx.float32)
            change = mx.linalg.norm(with_adapter - layer.base(x).astype(mx.float32)).item()
            assert change > 0
            distance = mx.linalg.norm(with_adapter - merged) / mx.linalg.norm(merged)
            worst = max(worst, distance.item())
        return worst

    assert mlx_call(largest_difference) < 5e-3  # the rounding of bfloat16 weights


def test_preview_measures_every_adapted_layer(trained):
    report = trained.preview()
    assert len(report.layers) == len(trained.report.layers)
    assert report.retained("16") == pytest.approx(1, abs=0.1)
    assert trained.kind in repr(report) and trained.kind in report._repr_html_()


def test_the_panel_shows_it_and_offers_it(trained):
    assert trained.kind in repr(trained)
    assert trained.kind in trained._repr_html_()
    assert f'kind="{trained.kind}"' in trained.code


def test_a_kind_without_change_is_refused_by_fuse_and_preview(demo):
    adapter = qlab.Adapter(demo, kind="mute", rank=2, keys=["q_proj"])
    for work in (adapter.fuse, adapter.preview):
        with pytest.raises(UnsupportedError, match="kind='mute' cannot be fused"):
            work()


def test_a_kind_without_compensation_refuses_such_an_initialization(demo):
    quantizer = qlab.Quantizer(demo, bits=3)
    adapter = qlab.Adapter(quantizer, kind="gain", rank=2, keys=["q_proj"], init="residual")
    with pytest.raises(ConfigError, match="kind='gain' has no error-compensating initialization"):
        _ = adapter.parameters
    adapter.close()


def test_a_layer_of_a_subclass_is_the_subclass_of_a_layer():
    layer = Halved().make(_frozen(), (8, 16), qlab.LoRAConfig(kind="halved", rank=2))
    assert isinstance(layer, LoRALayer) and layer.scale == 1.0


def _frozen():
    from qlab.nn.frozen import Frozen

    return Frozen(nn.Linear(16, 8), None, False)
