"""Starts that make up for the quantization error, against dense linear algebra, and the noise curve against noise."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from qlab.core.config.quant import QuantConfig
from qlab.core.config.quant import QuantPlan
from qlab.core.adapt.recovery import GRID
from qlab.core.adapt.recovery import noise_squares
from qlab.core.adapt.recovery import on_grid
from qlab.core.config.lora import LoRAConfig
from qlab.engine.adapt.activations import Inputs
from qlab.engine.adapt.activations import passing
from qlab.runtime.job import Job
from qlab.nn.linear import weight_of
from qlab.engine.adapt.directions import STARTS
from qlab.engine.adapt.directions import directions
from qlab.engine.adapt.directions import leading
from qlab.engine.adapt.recovery import recovery
from qlab.engine.adapt.init import start
from qlab.nn.frozen import Compute
from qlab.engine.adapt.attach import attach
from qlab.engine.models.surgery import module_at
from tests.tiny import on_mlx, quantized, tiny

SHAPES = [(40, 24), (24, 40), (32, 32)]


def seen(width: int, tokens: int = 200, seed: int = 0) -> Inputs:
    """Inputs with strong correlations."""
    mixing = mx.random.normal((width, width), key=mx.random.key(seed)) * mx.exp(
        mx.random.normal((width,), key=mx.random.key(9))
    )
    both = [mx.random.normal((tokens, width), key=mx.random.key(seed + n)) @ mixing for n in (1, 2)]
    return Inputs(*both)


def output_error(error: np.ndarray, moments: np.ndarray) -> float:
    return float(np.trace(error @ moments @ error.T))


def best(error: np.ndarray, moments: np.ndarray, rank: int) -> np.ndarray:
    """The correction of least output error, by QERA's theorem 1 with a matrix root and its inverse."""
    values, vectors = np.linalg.eigh(moments)
    root = vectors * np.sqrt(values) @ vectors.T
    u, s, v = np.linalg.svd(error @ root, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank] @ np.linalg.inv(root)


@pytest.mark.parametrize("shape", SHAPES)
@on_mlx
def test_all_singular_values_and_vectors_are_those_of_numpy(shape):
    matrix = mx.random.normal(shape, key=mx.random.key(1))
    vectors, squares = leading(matrix, 5)
    expected = np.linalg.svd(np.array(matrix), compute_uv=False) ** 2
    assert np.allclose(squares[: len(expected)], expected, rtol=1e-3, atol=1e-3)
    top = np.array(vectors[:, :5])
    assert np.allclose(top.T @ top, np.eye(5), atol=1e-3)


@on_mlx
def test_leading_directions_of_a_large_flat_matrix_hold_nearly_the_best_energy():
    matrix = mx.random.normal((1200, 1100), key=mx.random.key(1))
    vectors, squares = leading(matrix, 32)
    expected = np.linalg.svd(np.array(matrix), compute_uv=False)[:32] ** 2
    assert vectors.shape == (1200, 32) and 0.93 < squares.sum() / expected.sum() <= 1.0001
    assert float(mx.square(vectors.T @ matrix).sum()) == pytest.approx(squares.sum(), rel=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
@on_mlx
def test_qera_is_the_best_correction_of_its_rank_in_output_error(shape):
    error, inputs = mx.random.normal(shape, key=mx.random.key(3)), seen(shape[1])
    left = np.array(directions("qera", error, inputs, 6)[0][:, :6])
    plain, x = np.array(error, np.float64), np.array(inputs.seen, np.float64)
    moments = x.T @ x / len(x) + inputs.damping * np.eye(shape[1])
    found = output_error(plain - left @ left.T @ plain, moments)
    assert found == pytest.approx(output_error(plain - best(plain, moments, 6), moments), rel=1e-3)
    for init in ("residual", "diagonal"):
        other = np.array(directions(init, error, inputs, 6)[0][:, :6])
        assert found < output_error(plain - other @ other.T @ plain, moments)


@on_mlx
def test_diagonal_weighs_each_input_by_its_power():
    error, inputs = mx.random.normal((40, 24), key=mx.random.key(3)), seen(24)
    left = np.array(directions("diagonal", error, inputs, 6)[0][:, :6])
    plain, moments = np.array(error, np.float64), np.diag(np.array(inputs.power, np.float64))
    found = output_error(plain - left @ left.T @ plain, moments)
    assert found == pytest.approx(output_error(plain - best(plain, moments, 6), moments), rel=1e-3)


@pytest.mark.parametrize("shape", [(300, 300), (500, 200), (200, 500)])
def test_white_noise_has_the_singular_values_of_the_noise_curve(shape):
    noise = np.random.default_rng(0).normal(size=shape)
    squares = np.linalg.svd(noise, compute_uv=False) ** 2
    found, expected = np.cumsum(squares) / squares.sum(), np.cumsum(noise_squares(*shape))
    assert expected[-1] == pytest.approx(1)
    for rank in (1, 4, 16, 64):
        assert found[rank - 1] == pytest.approx(expected[rank - 1], rel=0.04)


def test_the_grid_holds_every_rank_to_16_and_every_power_of_two():
    assert set(range(1, 17)) | {2**n for n in range(13)} <= set(GRID) and list(GRID) == sorted(
        set(GRID)
    )
    assert np.isnan(on_grid(np.arange(5.0))[5:]).all() and list(on_grid(np.arange(5.0))[:5]) == [
        0,
        1,
        2,
        3,
        4,
    ]


def run(events):
    return Job(lambda: events).start().wait()


@pytest.fixture(scope="module")
def models():
    module, spec = tiny("llama tied")
    return module, quantized(module, spec, QuantConfig("affine", 2, 32)), spec


def weights(module):
    return lambda path: weight_of(module_at(module, path))


@on_mlx
def rows() -> list[mx.array]:
    made = [mx.random.randint(0, 97, (1, 24), key=mx.random.key(n)) for n in range(8)]
    mx.eval(made)
    return made


@pytest.mark.parametrize("scale", [2.0, -0.5])
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("init", STARTS)
def test_a_start_brings_every_layer_nearer_to_its_original(models, init, kind, scale):
    module, small, spec = models
    lora = LoRAConfig(
        rank=8, init=init, kind=kind, scale=scale, keys=("all-linear", "embed_tokens")
    )
    layers = lora.targets(spec)
    texts = rows()
    arrays = run(
        start(
            lora,
            layers,
            weights(module),
            weights(small),
            passing(module, [x.path for x in layers], texts[:6], texts[6:]),
        )
    )

    @on_mlx
    def check():
        for layer in layers:
            a, b = (arrays[f"{layer.path}.{name}"] for name in ("lora_a", "lora_b"))
            change = scale * (a @ b if layer.kind == "embedding" else (a @ b).T)
            error = weights(module)(layer.path) - weights(small)(layer.path)
            if init == "residual":
                share = float(mx.square(error - change).sum() / mx.square(error).sum())
                squares = np.linalg.svd(np.array(error), compute_uv=False) ** 2
                assert share == pytest.approx(squares[8:].sum() / squares.sum(), rel=1e-2)
            assert mx.abs(change).max() > 0 and mx.linalg.norm(a).item() == pytest.approx(
                mx.linalg.norm(b).item(), rel=0.5
            )
            if kind == "dora":
                assert mx.allclose(
                    arrays[f"{layer.path}.m"],
                    mx.linalg.norm(weights(module)(layer.path), axis=1),
                    rtol=1e-5,
                )
        made = attach(small, spec, lora, Compute(None, True), False)
        from mlx.utils import tree_flatten, tree_unflatten

        assert {p: x.shape for p, x in tree_flatten(made.trainable_parameters())} == {
            p: x.shape for p, x in arrays.items()
        }
        made.update(tree_unflatten(list(arrays.items())))
        distances = [mx.square(m(texts[7]) - module(texts[7])).sum().item() for m in (made, small)]
        assert distances[0] < (1.0 if init == "residual" else 0.8) * distances[1]

    check()


@on_mlx
def test_inputs_are_what_each_layer_was_given_block_by_block(models):
    module, _, spec = models
    texts = rows()
    paths = [layer.path for layer in spec.layers]
    groups = list(passing(module, paths, texts[:6], texts[6:]))
    assert len(groups) == 4 and all("model.layers.1." in path for path in groups[1])
    first = groups[0]
    assert first["model.layers.0.self_attn.q_proj"] is first["model.layers.0.self_attn.k_proj"]
    block, hidden = module.model.layers[0], module.model.embed_tokens(mx.concatenate(texts[:6]))
    expected = block.input_layernorm(hidden).reshape(-1, 64)
    assert mx.allclose(first["model.layers.0.self_attn.v_proj"].seen, expected, atol=1e-5)
    head = groups[3]["model.embed_tokens"]
    assert head.seen.shape == (6 * 24, 64) and head.heldout.shape == (2 * 24, 64)
    assert mx.allclose(
        module.model.embed_tokens.as_linear(head.seen),
        module(mx.concatenate(texts[:6])).reshape(-1, 97),
        atol=1e-4,
    )


@on_mlx
def test_recovered_shares_are_those_of_the_corrections(models):
    module, small, spec = models
    path, texts = "model.layers.1.mlp.down_proj", rows()
    inputs = {
        k: v for group in passing(module, [path], texts[:6], texts[6:]) for k, v in group.items()
    }[path]
    found = recovery(path, weights(module), weights(small), inputs)
    error = weights(module)(path) - weights(small)(path)
    for init in STARTS:
        left = directions(init, error, inputs, 64)[0][:, :8]
        rest = (error - left @ (left.T @ error)) @ inputs.heldout.T
        share = 1 - float(mx.square(rest).sum() / mx.square(error @ inputs.heldout.T).sum())
        assert found.share(8, init) == pytest.approx(share, abs=1e-3)
        assert (np.diff(found.output[init][np.isfinite(found.output[init])]) >= -1e-6).all()
        assert found.share(64, init) == pytest.approx(1, abs=1e-3)
    squares = np.linalg.svd(np.array(error), compute_uv=False) ** 2
    assert found.share(8) == pytest.approx(squares[:8].sum() / squares.sum(), rel=1e-3)
    assert found.share(20) == pytest.approx(squares[:20].sum() / squares.sum(), rel=1e-2)


@on_mlx
def test_a_layer_that_is_not_quantized_has_no_recovery(models):
    module, _, _ = models
    assert recovery("model.layers.0.mlp.up_proj", weights(module), weights(module), None) is None


def test_cache_measures_the_plan_and_keeps_what_is_known(models):
    from qlab.engine.quantize.measurements import ModelMeasurements
    from qlab.engine.adapt.recovery_cache import RecoveryCache

    module, _, spec = models
    cache = RecoveryCache(ModelMeasurements(module, None, spec), None, None)
    plan = QuantPlan(QuantConfig("affine", 3, 32), {"model.layers.0.mlp.up_proj": None})
    lora = LoRAConfig(rank=4)
    assert cache.latest((plan, "rtn")) == ({}, False)
    run(cache.measure((plan, "rtn"), lora, outputs=False))
    found, stale = cache.latest((plan, "rtn"))
    assert (
        not stale
        and set(found) == {x.path for x in lora.targets(spec)}
        and found["model.layers.0.mlp.up_proj"] is None
    )
    other, stale = cache.latest((QuantPlan(QuantConfig("affine", 2, 32)), "rtn"))
    assert stale and set(other) == set(found)
    kept = dict(found)
    run(cache.measure((plan, "rtn"), lora, outputs=False))
    assert all(cache.latest((plan, "rtn"))[0][path] is value for path, value in kept.items())
