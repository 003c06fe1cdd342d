"""A scheme and a solver that are registered in a cell work wherever those on the shelf do."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import qlab
from qlab import registry
from qlab.core.config.lora import LoRAConfig
from qlab.core.config.quant import QuantConfig, QuantPlan, Scheme
from qlab.core.config.solver import Solver
from qlab.core.config.train import TrainConfig
from qlab.core.memory.setup import Setup
from qlab.engine.memory.forecast import Forecast
from qlab.engine.models.skeleton import describe
from qlab.engine.models.surgery import module_at
from qlab.errors import UnsupportedError
from qlab.nn.linear import weight_of
from tests.tiny import on_mlx, quantized, tiny

LAYER = "model.layers.0.mlp.down_proj"
LORA = LoRAConfig(rank=4)
TRAIN = TrainConfig(iters=2, batch_size=2, max_seq_length=48, grad_checkpoint=False)


class Bytes(Scheme):
    """Signed bytes with one float16 scale for each group."""

    name = "bytes"
    title = "signed bytes, float16 scale per group"
    bits = (8,)
    group_sizes = (32, 64)
    default_bits = 8
    default_group_size = 64
    stock_mode = None

    def layout(self, shape, config, dtype):
        groups = (*shape[:-1], shape[-1] // config.group_size)
        return {"weight": (shape, "int8"), "scales": (groups, "float16")}

    def quantize(self, weight, config):
        groups = weight.astype(mx.float32).reshape(*weight.shape[:-1], -1, config.group_size)
        scales = (mx.abs(groups).max(-1) / 127).astype(mx.float16)
        divisor = mx.where(scales == 0, 1, scales)[..., None]
        codes = mx.clip(mx.round(groups / divisor), -127, 127)
        return {"weight": codes.astype(mx.int8).reshape(weight.shape), "scales": scales}

    def dequantize(self, packed, config, dtype):
        codes = packed["weight"]
        groups = codes.astype(dtype).reshape(*codes.shape[:-1], -1, config.group_size)
        return (groups * packed["scales"].astype(dtype)[..., None]).reshape(codes.shape)


class Sealed(Bytes):
    """The same, but its dequantization holds an operation that cannot be exported as a graph."""

    name = "sealed"
    unreadable_on = ("cpu", "cuda", "metal")

    def dequantize(self, packed, config, dtype):
        return mx.checkpoint(super().dequantize)(packed, config, dtype)

    def dequantize_readable(self, packed, config, dtype):
        return super().dequantize(packed, config, dtype)


class Clipped(Solver):
    """Round to nearest after clipping to two standard deviations."""

    name = "clipped"
    title = "clipped at two standard deviations"
    needs_inputs = False
    modes = None

    def solve(self, weight, config, input_power=None):
        limit = 2 * weight.astype(mx.float32).std()
        return config.scheme.quantize(mx.clip(weight, -limit, limit).astype(weight.dtype), config)


@pytest.fixture(autouse=True)
def registered():
    qlab.register("schemes", Bytes())
    qlab.register("schemes", Sealed())
    qlab.register("solvers", Clipped())
    yield
    for kind, name in (("schemes", "bytes"), ("schemes", "sealed"), ("solvers", "clipped")):
        del registry.shelf(kind)[name]


@pytest.fixture(scope="module")
def base():
    return qlab.load("demo")


@on_mlx
def weight(model, path: str = LAYER) -> np.ndarray:
    return np.array(weight_of(module_at(model.module, path), mx.float32))


@on_mlx
def rounded(model, solver: str, config: QuantConfig) -> np.ndarray:
    """What a layer's weight is after a solver has filled a scheme."""
    original = weight_of(module_at(model.module, LAYER))
    packed = registry.get("solvers", solver).solve(original, config)
    return np.array(config.scheme.dequantize(packed, config, mx.float32))


def test_it_is_measured_and_compared(base):
    q = qlab.Quantizer(base, mode="bytes")
    assert q.report.bits_per_weight == pytest.approx(8.25, abs=0.02)  # norms are not quantized
    worst = max(layer.relative_error for layer in q.report.layers if layer.config)
    affine = qlab.Quantizer(base, mode="affine", bits=8).report
    assert worst < 3 * max(layer.relative_error for layer in affine.layers if layer.config)
    assert any(point.config.mode == "bytes" for point in q.compare().points)
    assert "bytes" in [mode[0] for mode in q.state().modes]


def test_it_is_quantized_trained_saved_and_opened_again(base, tmp_path):
    config = QuantConfig("bytes")
    model = qlab.Quantizer(base, mode="bytes").quantize()
    assert (weight(model) == rounded(base, "rtn", config)).all()

    adapter = qlab.Adapter(model, rank=4, num_layers=1)
    trainer = qlab.Trainer(adapter, ["a text to learn"] * 4, config=TRAIN, path=tmp_path / "run")
    assert trainer.run().steps == 2

    model.save(tmp_path / "model")
    again = qlab.load(tmp_path / "model")
    assert (weight(again) == weight(model)).all()
    assert again.spec.nbytes == model.spec.nbytes


@on_mlx
def test_its_memory_is_estimated_by_formula_and_by_trace():
    module, spec = tiny()
    config = QuantConfig("bytes", group_size=32)
    forecast = Forecast(module, "tiny", None, True)
    setup = Setup(QuantPlan(config), LORA, TRAIN)
    (_, formula), (_, traced) = forecast.by_formula(setup), forecast.by_trace(setup)
    stored = describe(quantized(module, spec, config), "").nbytes
    assert formula["weights"] == traced["weights"] == stored
    assert sum(formula.values()) == pytest.approx(sum(traced.values()), rel=0.12)


@on_mlx
def test_what_cannot_be_exported_is_read_as_the_scheme_says_instead(monkeypatch):
    module, _ = tiny()

    def traced(mode: str) -> dict[str, int]:
        forecast = Forecast(module, "tiny", None, True)
        return forecast.by_trace(Setup(QuantPlan(QuantConfig(mode)), LORA, TRAIN))[1]

    assert traced("sealed") == traced("bytes")
    monkeypatch.setattr(Sealed, "unreadable_on", ())
    with pytest.raises(UnsupportedError, match="cannot be read"):
        traced("sealed")


@pytest.mark.parametrize("mode", ["bytes", "affine"])
def test_a_solver_is_in_the_menu_and_fills_every_scheme(base, mode):
    q = qlab.Quantizer(base, mode=mode, solver="clipped")
    assert ("clipped", Clipped.title) in q.state().solvers
    model = q.quantize()
    expected = rounded(base, "clipped", q.plan.default)
    assert (weight(model) == expected).all()
    assert not (expected == rounded(base, "rtn", q.plan.default)).all()
    assert not registry.get("solvers", "clipped").needs_inputs
