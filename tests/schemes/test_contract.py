"""What every scheme on the shelf must do: a new file is tested by standing there."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from qlab import registry
from qlab.core.config import QuantConfig
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
    assert sum(a.nbytes for a in packed.values()) == config.scheme.nbytes(w.shape, config, dtype.size)
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
    assert mx.abs(config.scheme.dequantize(config.scheme.quantize(zeros, config), config, mx.float32)).max().item() <= 1e-6


@pytest.mark.parametrize("config", DEFAULTS, ids=label)
def test_roundtrip_of_a_sample_equals_storing_the_whole(config):
    w = mx.random.normal((64, 256), key=mx.random.key(2)) * 0.02
    whole = config.scheme.dequantize(config.scheme.quantize(w, config), config, mx.float32)
    rows = w.reshape(-1, 128)[10:20]
    amax = mx.full((10, 1), mx.abs(w).max())
    sample = config.scheme.roundtrip(rows, config, amax)
    # only double quantization looks beyond its row: its scales' mean differs
    tolerance = 2e-3 if config.mode == "nf4_dq" else 0
    assert mx.abs(sample - whole.reshape(-1, 128)[10:20]).max().item() <= tolerance


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (QuantConfig("affine", 2, 64), 0.394), (QuantConfig("affine", 3, 64), 0.189), (QuantConfig("affine", 4, 64), 0.091),
        (QuantConfig("affine", 5, 64), 0.044), (QuantConfig("affine", 6, 64), 0.022), (QuantConfig("affine", 8, 64), 0.0054),
        (QuantConfig("affine", 4, 32), 0.081), (QuantConfig("affine", 4, 128), 0.100), (QuantConfig("nf4"), 0.092),
        (QuantConfig("nvfp4"), 0.0953), (QuantConfig("mxfp4"), 0.1155), (QuantConfig("symmetric"), 0.1076),
    ],
    ids=lambda x: x.label if isinstance(x, QuantConfig) else str(x),
)  # fmt: skip
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
