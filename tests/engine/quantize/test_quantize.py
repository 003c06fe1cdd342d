"""What is saved: stock mlx-lm opens it with the same logits, or qlab does, bit for bit."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import qlab
from qlab.engine.quantize.quantize import chosen
from qlab.runtime.job import mlx_call
from qlab.engine.models.surgery import module_at
from qlab.errors import ConfigError
from qlab.errors import SaveError
from qlab.errors import WeightsError

TOKENS = [5, 100, 7, 900, 33, 2]


def logits(module) -> np.ndarray:
    return mlx_call(lambda: np.array(module(mx.array([TOKENS])).astype(mx.float32)))


def stock(path: Path) -> np.ndarray:
    from mlx_lm import load

    return mlx_call(lambda: np.array(load(str(path))[0](mx.array([TOKENS])).astype(mx.float32)))


@pytest.mark.parametrize(
    ("mode", "bits", "group"),
    [
        ("affine", 4, 64),
        ("affine", 3, 32),
        ("affine", 1, 128),
        ("symmetric", 5, 64),
        ("mxfp4", 4, 32),
        ("mxfp8", 8, 32),
        ("nvfp4_plain", 4, 16),
    ],
)
def test_native_scheme_opens_in_stock_mlx_lm_with_equal_logits(demo, tmp_path, mode, bits, group):
    q = qlab.Quantizer(demo, bits=bits, group_size=group, mode=mode)
    made = q.quantize()
    assert "mlx_lm.load" in made.save(tmp_path / "m")
    assert np.array_equal(stock(tmp_path / "m"), logits(made.module))
    assert made.spec.nbytes == q.report.nbytes
    q.close()


def test_overrides_are_written_as_mlx_lm_reads_them(demo, tmp_path):
    q = qlab.Quantizer(demo, bits=4, group_size=64)
    q.set("model.layers.0.mlp.down_proj", bits=8, group_size=32)
    q.set("*.v_proj", bits=6)
    q.set("model.layers.1.self_attn.q_proj", mode="mxfp4", bits=4)
    q.set("model.embed_tokens", bits=None)
    made = q.quantize()
    made.save(tmp_path / "m")
    assert np.array_equal(stock(tmp_path / "m"), logits(made.module))
    written = json.loads((tmp_path / "m" / "config.json").read_text())["quantization"]
    assert written["model.layers.0.mlp.down_proj"] == {
        "group_size": 32,
        "bits": 8,
        "mode": "affine",
    }
    again = qlab.load(tmp_path / "m")
    assert again.spec["model.layers.1.self_attn.q_proj"].storage_label == "mxfp4 4-bit g32"
    assert again.spec["model.embed_tokens"].storage_label is None
    assert "already quantized" in again.notes[0]
    q.close()


@pytest.mark.parametrize("mode", ["nf4", "nf4_dq", "nvfp4"])
def test_scheme_that_mlx_lm_cannot_read_comes_back_bit_for_bit(demo, tmp_path, mode):
    q = qlab.Quantizer(demo, mode=mode)
    q.set("model.layers.2.mlp.up_proj", bits=4, group_size=64, mode="affine")
    made = q.quantize()
    assert "qlab.load" in made.save(tmp_path / "m")
    again = qlab.load(tmp_path / "m")
    assert np.array_equal(logits(again.module), logits(made.module))
    assert again.spec.nbytes == made.spec.nbytes == q.report.nbytes
    q.close()


def test_packed_layer_passes_gradients_to_its_input_only(demo):
    q = qlab.Quantizer(demo, mode="nf4")
    made = q.quantize()
    q.close()

    def run():
        layer = module_at(made.module, "model.layers.0.mlp.up_proj")
        x = mx.random.normal((3, 256), key=mx.random.key(0))
        dense = layer.dense(mx.float32)
        got = mx.grad(lambda x: mx.square(layer(x)).sum())(x)
        wanted = mx.grad(lambda x: mx.square(x @ dense.T).sum())(x)
        return mx.allclose(got, wanted, rtol=1e-4, atol=1e-4).item(), layer.trainable_parameters()

    close, trainable = mlx_call(run)
    assert close and not trainable


def test_searched_lowers_kl_and_keeps_the_bytes(demo):
    q = qlab.Quantizer(demo, bits=3, group_size=64)
    plain = q.judge()
    q.solver = "searched"
    searched = q.judge()
    assert searched.kl_nats < 0.85 * plain.kl_nats
    assert q.quantize().spec.nbytes == q.report.nbytes
    q.close()


def test_failed_save_leaves_what_was_there(demo, tmp_path, monkeypatch):
    target = tmp_path / "m"
    demo.save(target)
    before = sorted((p.name, p.stat().st_mtime_ns) for p in target.iterdir())

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mlx_lm.utils.save_model", full)
    with pytest.raises(SaveError, match="No space left"):
        demo.save(target)
    assert sorted((p.name, p.stat().st_mtime_ns) for p in target.iterdir()) == before
    assert os.listdir(tmp_path) == ["m"]
    (target / "thesis.tex").write_text("all there is")
    with pytest.raises(
        SaveError, match=r"holds other files too \(thesis.tex\); give the name of a new folder"
    ):
        demo.save(target)
    assert (target / "thesis.tex").read_text() == "all there is"
    (tmp_path / "file").write_text("x")
    with pytest.raises(SaveError, match="is a file"):
        demo.save(tmp_path / "file")


def test_weights_that_are_not_finite_are_refused_and_named(tmp_path):
    model = qlab.load("demo")
    path = "model.layers.3.mlp.gate_proj"

    def spoil():
        layer = module_at(model.module, path)
        layer.weight = mx.where(
            mx.arange(layer.weight.size).reshape(layer.weight.shape) == 77, mx.inf, layer.weight
        )
        mx.eval(layer.weight)

    mlx_call(spoil)
    q = qlab.Quantizer(model)
    with pytest.raises(WeightsError, match=path):
        q.measure(exact=False)
    with pytest.raises(WeightsError, match=path):
        q.quantize()
    q.close()


def test_an_override_that_its_layer_cannot_hold_is_refused_with_what_can(demo):
    path = "model.layers.0.mlp.down_proj"
    q = qlab.Quantizer(demo)
    q.close()
    q.overrides = {path: qlab.QuantConfig(group_size=128)}
    assert q.quantize().plan == q.plan  # 512 wide
    spec = replace(
        demo.spec,
        layers=tuple(
            replace(x, shape=(256, 96)) if x.path == path else x for x in demo.spec.layers
        ),
    )
    with pytest.raises(
        ConfigError,
        match=f"'{path}' cannot be stored as affine 4-bit g128: .* nearest group size that does is 32",
    ):
        chosen(spec, q.plan)
    with pytest.raises(ConfigError, match="give None, which keeps it as it is"):
        chosen(
            replace(spec, layers=tuple(replace(x, shape=(256, 40)) for x in spec.layers)), q.plan
        )
