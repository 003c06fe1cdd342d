"""Sampled numbers against exact ones, and the job that fills the table with them."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import qlab
from qlab.core.config.quant import QuantConfig
from qlab.engine.models.surgery import module_at
from qlab.nn.linear import weight_of
from qlab.runtime.job import Job
from qlab.runtime.job import mlx_call
from qlab.engine.quantize.measurements import ModelMeasurements
from tests.tiny import tiny

CONFIGS = [
    QuantConfig(m, b)
    for m, b in [
        ("affine", 2),
        ("affine", 4),
        ("symmetric", 4),
        ("nf4", 4),
        ("mxfp4", 4),
        ("nvfp4", 4),
    ]
]


def run(events):
    return Job(events).start().wait()


@pytest.fixture(scope="module")
def measured(demo):
    made = ModelMeasurements(demo.module, demo.tokenizer, demo.spec)
    run(lambda: made.sample(CONFIGS[0]))
    return made


def test_sampled_error_is_near_the_exact_one_and_its_standard_error_covers_it(measured, demo):
    sampled = measured.table.snapshot()
    off, z = [], []
    for config in CONFIGS:
        run(lambda c=config: measured.measure_exactly(qlab.QuantPlan(c)))
        row = sampled.row(config)
        exact = measured.table.measure("relative_error")[row]
        guess, se = (
            sampled.measure("relative_error")[row],
            sampled.measure("relative_error_se")[row],
        )
        off.append(np.abs(guess / exact - 1))
        z.append(((guess - exact) / np.maximum(se, 1e-9 * exact))[se > 0])
    assert np.quantile(np.concatenate(off), 0.95) < 0.02
    assert 0.7 < np.sqrt(np.mean(np.concatenate(z) ** 2)) < 1.4


def test_every_legal_config_of_every_layer_is_filled(measured):
    table = measured.table
    assert np.isfinite(table.measure("relative_error")[table.legal]).all()
    assert np.isnan(table.measure("relative_error")[~table.legal]).all()


def test_kurtosis_is_the_fourth_moment(measured, demo):
    layer = demo.spec.layers[5]
    w = mlx_call(
        lambda: np.array(weight_of(module_at(demo.module, layer.path)).astype(mx.float32))
    ).astype(np.float64)
    expected = ((w - w.mean()) ** 4).mean() / w.var() ** 2
    assert measured.table.kurtosis[5] == pytest.approx(expected, rel=1e-3)


def test_predicted_kl_adds_up_to_about_the_measured_one(demo):
    made = ModelMeasurements(demo.module, demo.tokenizer, demo.spec)
    plan = qlab.QuantPlan(QuantConfig("affine", 4, 64))
    run(lambda: made.sample(plan.default))
    run(lambda: made.predict())
    row = made.table.row(plan.default)
    predicted = made.table.measure("kl_nats")[row].sum()
    measured = run(lambda: made.evaluate(plan, "rtn")).kl_nats
    assert 0.6 < predicted / measured < 1.7


def test_stopped_job_keeps_what_it_has_measured_and_goes_on_later(demo):
    made = ModelMeasurements(demo.module, demo.tokenizer, demo.spec)
    seen = []
    job = Job(
        lambda: made.sample(CONFIGS[1]),
        on_event=lambda e: (seen.append(e), job.stop() if len(seen) == 20 else None),
    )
    assert job.start().wait() is None and job.state == "stopped"
    known = np.isfinite(made.table.measure("relative_error")).sum()
    assert known > 0
    run(lambda: made.sample(CONFIGS[1]))
    assert np.isfinite(made.table.measure("relative_error")).sum() > known


def test_the_error_of_a_large_embedding_is_that_of_float64():
    """The sampled estimate agrees, too: added one by one, both would be off by percents."""
    module, spec = mlx_call(lambda: tiny("llama", vocab_size=1 << 18, hidden_size=64))
    made = ModelMeasurements(module, None, spec)
    layer = next(layer for layer in spec.layers if layer.kind == "embedding")
    column = spec.layers.index(layer)
    config = QuantConfig("affine", 4, 64)
    row = made.table.row(config)
    run(lambda: made.sample(config))
    sampled = made.table.measure("relative_error")[row, column]
    standard_error = made.table.measure("relative_error_se")[row, column]
    run(lambda: made.measure_exactly(qlab.QuantPlan(config)))

    def exact() -> float:
        weight = weight_of(module_at(module, layer.path)).astype(mx.float32)
        packed = config.scheme.quantize(weight, config)
        dequantized = np.array(config.scheme.dequantize(packed, config, mx.float32), np.float64)
        full = np.array(weight, np.float64)
        return float(np.linalg.norm(full - dequantized) / np.linalg.norm(full))

    true = mlx_call(exact)
    assert made.table.measure("relative_error")[row, column] == pytest.approx(true, rel=1e-5)
    assert abs(sampled - true) < 4 * standard_error
