"""What every scheme on the shelf must do: a new file is tested by standing there."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from qlab import registry
from qlab.core.config.quant import QuantConfig
from qlab.errors import ConfigError

CONFIGS = [
    QuantConfig(scheme.name, bits, group)
    for scheme in registry.shelf("schemes").values()
    for bits in scheme.bits
    for group in scheme.group_sizes
]
DEFAULTS = [QuantConfig(name) for name in registry.shelf("schemes")]


def label(config: QuantConfig) -> str:
    return config.label


def error(config: QuantConfig, w: mx.array) -> float:
    stored = config.scheme.dequantize(config.scheme.quantize(w, config), config, mx.float32)
    return float(mx.sqrt(mx.square(stored - w).sum() / mx.square(w).sum()).item())


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_bytes_are_those_really_stored(config, dtype):
    w = mx.random.normal((24, 256)).astype(dtype)
    packed = config.scheme.quantize(w, config)
    assert sum(a.nbytes for a in packed.values()) == config.scheme.nbytes(
        w.shape, config, dtype.size
    )
    layout = config.scheme.layout(w.shape, config, str(dtype).removeprefix("mlx.core."))
    assert {
        name: (a.shape, str(a.dtype).removeprefix("mlx.core.")) for name, a in packed.items()
    } == layout
    assert packed["weight"].dtype == mx.uint32


@pytest.mark.parametrize("config", DEFAULTS, ids=label)
def test_shape_and_dtype_come_back(config):
    for dtype in (mx.float32, mx.bfloat16):
        w = mx.random.normal((8, 128)).astype(dtype)
        stored = config.scheme.dequantize(config.scheme.quantize(w, config), config, dtype)
        assert stored.shape == w.shape and stored.dtype == dtype


@pytest.mark.parametrize("config", DEFAULTS, ids=label)
def test_experts_are_stored_like_the_rows_they_are(config):
    w = mx.random.normal((3, 16, 256), key=mx.random.key(1)) * 0.02
    stored = config.scheme.dequantize(config.scheme.quantize(w, config), config, mx.float32)
    assert stored.shape == w.shape
    assert error(config, w) < 0.15


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_awkward_rows_stay_finite_and_zeros_stay_zero(config):
    w = np.random.default_rng(0).normal(0, 0.02, (6, 256)).astype(np.float32)
    w[0] = 0
    w[1] = 0.3
    w[2, 5] = 500.0
    w[3] *= 1e-6
    w[4] = -np.abs(w[4])
    w = mx.array(w)
    stored = config.scheme.dequantize(config.scheme.quantize(w, config), config, mx.float32)
    assert mx.isfinite(stored).all().item()
    assert mx.abs(stored[0]).max().item() <= 1e-6
    zeros = mx.zeros((4, 256))
    assert (
        mx.abs(config.scheme.dequantize(config.scheme.quantize(zeros, config), config, mx.float32))
        .max()
        .item()
        <= 1e-6
    )


@pytest.mark.parametrize("size", [1e-36, 1e-38, 1e-41])
@pytest.mark.parametrize("config", DEFAULTS, ids=label)
def test_weights_at_the_edge_of_float32_stay_finite_and_small(config, size):
    # unused weights decay to such values; exponents and reciprocals overflow there
    w = mx.random.normal((4, 128), key=mx.random.key(6)) * size
    w[0] = mx.random.normal((128,), key=mx.random.key(7)) * 0.02
    stored = config.scheme.dequantize(config.scheme.quantize(w, config), config, mx.float32)
    # double quantization stores a tiny scale with the error of an ordinary one
    assert mx.abs(stored[1:]).max().item() <= (1e-3 if config.mode == "nf4_dq" else 8 * size)
    assert mx.linalg.norm(stored[0] - w[0]).item() < 0.2 * mx.linalg.norm(w[0]).item()


@pytest.mark.parametrize("config", [c for c in DEFAULTS if c.mode.startswith("nf4")], ids=label)
def test_a_weight_that_is_not_a_number_spoils_its_values_and_not_the_process(config):
    w = mx.ones((4, 128))
    w[1, 3] = float("nan")
    stored = config.scheme.dequantize(config.scheme.quantize(w, config), config, mx.float32)
    assert mx.isnan(stored[1, :64]).all().item()


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nf4", "nvfp4"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_stored_values_are_stored_again_unchanged(mode, dtype):
    # not so for affine (the far edge of its range moves), nf4_dq (so does the mean) and subnormal nvfp4 scales
    config = QuantConfig(mode)
    w = (mx.random.normal((64, 256), key=mx.random.key(5)) * 0.02).astype(dtype)
    once = config.scheme.dequantize(config.scheme.quantize(w, config), config, dtype)
    twice = config.scheme.dequantize(config.scheme.quantize(once, config), config, dtype)
    assert mx.array_equal(once, twice)


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.scheme.stock_mode], ids=label)
def test_what_stock_mlx_reads_is_multiplied_by_its_own_kernel(config):
    w = mx.random.normal((32, 256), key=mx.random.key(8)) * 0.02
    x = mx.random.normal((5, 256), key=mx.random.key(9))
    packed = config.scheme.quantize(w, config)
    y = mx.quantized_matmul(
        x,
        packed["weight"],
        packed["scales"],
        packed.get("biases"),
        group_size=config.group_size,
        bits=config.bits,
        mode=config.scheme.stock_mode,
    )
    assert mx.allclose(
        y, x @ config.scheme.dequantize(packed, config, mx.float32).T, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("config", DEFAULTS, ids=label)
def test_a_stack_of_samples_gives_each_tensor_its_own_error(config):
    tensors = [
        mx.random.normal((64, 512), key=mx.random.key(i)) * size
        for i, size in enumerate((3e-5, 0.02, 3))
    ]
    rows = mx.concatenate([w.reshape(-1, 128)[:64] for w in tensors])
    amax = mx.repeat(mx.stack([mx.abs(w).max() for w in tensors]), 64)[:, None]
    sample = mx.split(config.scheme.roundtrip(rows, config, mx.float32, amax), 3)
    for w, part in zip(tensors, sample, strict=True):
        stored = config.scheme.dequantize(
            config.scheme.quantize(w, config), config, mx.float32
        ).reshape(-1, 128)[:64]
        # double quantization's mean and blocks are the sample's, which differ a little from the tensor's
        tolerance = 0.03 if config.mode == "nf4_dq" else 0
        assert mx.linalg.norm(part - stored).item() <= tolerance * mx.linalg.norm(stored).item()


@pytest.mark.parametrize("config", DEFAULTS, ids=label)
def test_roundtrip_of_a_sample_equals_storing_the_whole(config):
    w = mx.random.normal((64, 256), key=mx.random.key(2)) * 0.02
    whole = config.scheme.dequantize(config.scheme.quantize(w, config), config, mx.float32)
    rows = w.reshape(-1, 128)[10:20]
    amax = mx.full((10, 1), mx.abs(w).max())
    sample = config.scheme.roundtrip(rows, config, mx.float32, amax)
    # only double quantization looks beyond its row: its scales' mean differs
    tolerance = 2e-3 if config.mode == "nf4_dq" else 0
    assert mx.abs(sample - whole.reshape(-1, 128)[10:20]).max().item() <= tolerance


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (QuantConfig("affine", 2, 64), 0.394),
        (QuantConfig("affine", 3, 64), 0.189),
        (QuantConfig("affine", 4, 64), 0.091),
        (QuantConfig("affine", 5, 64), 0.044),
        (QuantConfig("affine", 6, 64), 0.022),
        (QuantConfig("affine", 8, 64), 0.0054),
        (QuantConfig("affine", 4, 32), 0.081),
        (QuantConfig("affine", 4, 128), 0.100),
        (QuantConfig("nf4"), 0.092),
        (QuantConfig("nvfp4"), 0.0953),
        (QuantConfig("mxfp4"), 0.1155),
        (QuantConfig("symmetric"), 0.1076),
    ],
    ids=lambda x: x.label if isinstance(x, QuantConfig) else str(x),
)
def test_error_on_gaussian_weights_is_the_known_one(config, expected):
    w = mx.random.normal((512, 1024), key=mx.random.key(3))
    assert error(config, w) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("config", DEFAULTS, ids=label)
def test_more_bits_or_the_same_never_lose_to_two_bits(config):
    w = mx.random.normal((64, 256), key=mx.random.key(4))
    assert error(config, w) < error(QuantConfig("affine", 2, 64), w)


def test_illegal_settings_are_refused_with_the_nearest_legal_one():
    with pytest.raises(ConfigError, match=r"bits=7 .* nearest is 6"):
        QuantConfig("affine", 7, 64)
    with pytest.raises(ConfigError, match=r"group_size=48 .* nearest is 32"):
        QuantConfig("affine", 4, 48)
    with pytest.raises(ConfigError, match=r"'afine'.*Did you mean 'affine'"):
        QuantConfig("afine", 4, 64)
    with pytest.raises(ConfigError, match="bits=True"):
        QuantConfig("affine", True, 64)


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_repr_pastes_back(config):
    assert eval(repr(config)) == config
