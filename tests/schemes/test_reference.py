"""The shelf against references: bit-exact where the format leaves no freedom."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from qlab.core.config.quant import QuantConfig
from qlab.ops.dynamic_map import dynamic_map
from qlab.schemes.nf4 import _dequantized_scales
from qlab.schemes.nf4 import _quantized_scales
from tests.schemes import reference

GOLDEN = np.load(Path(__file__).parent / "golden" / "nf4.npz")
DTYPES = ("float32", "bfloat16", "float16")


def weights(dtype: str, seed: int = 0) -> tuple[mx.array, np.ndarray]:
    """Heavy-tailed weights in a dtype, with the same values as float32."""
    values = (np.random.default_rng(seed).standard_t(5, (24, 384)) * 0.02).astype(np.float32)
    w = mx.array(values).astype(getattr(mx, dtype))
    return w, np.array(w.astype(mx.float32))


def float32(a: mx.array) -> np.ndarray:
    return np.array(a.astype(mx.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_affine_is_bit_exact(bits, group, dtype):
    w, values = weights(dtype)
    config = QuantConfig("affine", bits, group)
    packed = config.scheme.quantize(w, config)
    codes, scales, biases = reference.affine(values, bits, group, dtype)
    assert np.array_equal(reference.unpack(np.array(packed["weight"]), bits, 384), codes)
    assert np.array_equal(float32(packed["scales"]).reshape(-1), scales)
    assert np.array_equal(float32(packed["biases"]).reshape(-1), biases)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_symmetric_is_what_the_formula_says_and_runs_on_the_native_kernel(bits, group, dtype):
    w, values = weights(dtype)
    config = QuantConfig("symmetric", bits, group)
    packed = config.scheme.quantize(w, config)
    stored = float32(config.scheme.dequantize(packed, config, mx.float32))
    expected = reference.symmetric(values, bits, group, dtype)
    # the native kernel computes scale·u + bias in float32, which rounds once where s·q does not
    assert np.abs(stored - expected).max() <= 2e-7 * 2**bits * np.abs(expected).max()
    x = mx.random.normal((3, 384))
    arrays = [
        packed[name].astype(mx.float32) if name != "weight" else packed[name]
        for name in ("weight", "scales", "biases")
    ]
    y = mx.quantized_matmul(x, *arrays, transpose=True, group_size=group, bits=bits)
    assert mx.allclose(y, x @ mx.array(expected).T, atol=1e-4)


def test_symmetric_never_produces_the_lowest_code():
    w, _ = weights("float32")
    config = QuantConfig("symmetric", 3, 64)
    codes = reference.unpack(np.array(config.scheme.quantize(w, config)["weight"]), 3, 384)
    assert codes.min() == 1 and codes.max() == 7


@pytest.mark.parametrize(
    ("mode", "largest", "grid"),
    [("mxfp4", 6.0, reference.E2M1), ("mxfp8", 448.0, reference.e4m3())],
)
def test_mxfp_values_are_elements_times_a_power_of_two_and_nearest(mode, largest, grid):
    w, values = weights("float32")
    config = QuantConfig(mode)
    stored = float32(
        config.scheme.dequantize(config.scheme.quantize(w, config), config, mx.float32)
    ).reshape(-1, 32)
    groups = values.reshape(-1, 32)
    scale = reference.mxfp_scale(np.abs(groups).max(1, keepdims=True), largest)
    assert reference.nearest(stored / scale, grid).max() == 0
    # a tie may go either way (back ends differ), so the distance is compared, not the value
    assert np.allclose(
        np.abs(stored - groups) / scale, reference.nearest(groups / scale, grid), atol=1e-6
    )


@pytest.mark.parametrize("size", [1.0, 0.01])
@pytest.mark.parametrize("mode", ["nvfp4", "nvfp4_plain"])
def test_nvfp4_values_are_elements_times_the_nearest_e4m3_scale(mode, size):
    w = mx.random.normal((24, 256), key=mx.random.key(3)) * size
    config = QuantConfig(mode)
    packed = config.scheme.quantize(w, config)
    stored = float32(config.scheme.dequantize(packed, config, mx.float32)).reshape(-1, 16)
    factor = np.float32(448 * 6 / packed["global_scale"].item() if mode == "nvfp4" else 1)
    groups = np.array(w).reshape(-1, 16) * factor
    scale = reference.nearest_value(np.abs(groups).max(1) / np.float32(6), reference.e4m3())[
        :, None
    ]
    assert np.allclose(
        np.abs(stored * factor - groups) / scale,
        reference.nearest(groups / scale, reference.E2M1),
        atol=1e-6,
    )


def test_nvfp4_tensor_scale_is_exact_and_mends_small_weights():
    w = mx.random.normal((64, 512), key=mx.random.key(0)) * 0.005
    errors = {}
    for mode in ("nvfp4", "nvfp4_plain"):
        config = QuantConfig(mode)
        packed = config.scheme.quantize(w, config)
        stored = config.scheme.dequantize(packed, config, mx.float32)
        errors[mode] = (mx.square(stored - w).sum() / mx.square(w).sum()).item()
    assert errors["nvfp4_plain"] / errors["nvfp4"] > 1.8  # 2.05 for σ = 0.005
    config = QuantConfig("nvfp4")
    packed = config.scheme.quantize(w, config)
    factor = 448 * 6 / packed["global_scale"].item()
    assert np.log2(factor) == np.round(np.log2(factor))
    native = mx.dequantize(
        packed["weight"],
        packed["scales"],
        mode="nvfp4",
        global_scale=packed["global_scale"],
        dtype=mx.float32,
    )
    assert mx.array_equal(native, config.scheme.dequantize(packed, config, mx.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nf4_equals_bitsandbytes_bit_for_bit(dtype):
    w = mx.array(GOLDEN["weight"]).astype(getattr(mx, dtype))
    config = QuantConfig("nf4")
    packed = config.scheme.quantize(w, config)
    codes = reference.unpack(np.array(packed["weight"]), 4, w.shape[1]).reshape(-1)
    theirs = GOLDEN[f"{dtype}_packed"]
    assert np.array_equal(codes, np.stack([theirs >> 4, theirs & 15], 1).reshape(-1))
    assert np.array_equal(np.array(packed["absmax"]).reshape(-1), GOLDEN[f"{dtype}_absmax"])
    values = config.scheme.dequantize(packed, config, w.dtype)
    got = np.array(values if dtype == "float32" else values.view(mx.int16))
    assert np.array_equal(got, GOLDEN[f"{dtype}_values"])


def test_double_quantization_equals_bitsandbytes_exact_rule():
    assert np.array_equal(dynamic_map(True), GOLDEN["dq_map"])
    made = _quantized_scales(mx.array(GOLDEN["dq_scales"]))
    assert np.array_equal(np.array(made["absmax"]), GOLDEN["dq_codes"])
    assert np.allclose(np.array(made["absmax_scales"]), GOLDEN["dq_second"], rtol=1e-6)
    assert np.allclose(
        made["absmax_offset"].item(), GOLDEN["dq_offset"], rtol=1e-6
    )  # the order of a sum is free
    assert np.allclose(np.array(_dequantized_scales(made)), GOLDEN["dq_back"], rtol=1e-6)
