"""NVFP4: E2M1 elements with an E4M3 scale per 16, with and without a scale of the whole tensor.

Knows no model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlab.core.config.quant import Layout, PackedArrays, QuantConfig, Scheme, Shape
from qlab.registry import LazyModule

if TYPE_CHECKING:
    import mlx.core as mx
else:
    mx = LazyModule("mlx.core")

_GROUP = 16
_FULL = 448.0 * 6.0  # largest E4M3 scale times largest E2M1 element
_LARGEST_EXPONENT = 100  # so that the factor of a tensor and its inverse are normal float32 numbers


class NvFp4(Scheme):
    """E2M1 floats that share an E4M3 scale in groups of 16.

    The group scales of normal LLM weights are subnormal in E4M3, and lose digits there. With
    ``tensor_scale`` the tensor is first multiplied by the largest power of two that keeps every
    group scale within 448, and the result is divided by it, both exactly. It is stored as MLX's
    ``global_scale`` = 448·6·2^−k. MLX's quantized linear layer does not take that scale, so stock
    mlx-lm reads only the plain form.

    Source: MLX's mode ``nvfp4`` (``mlx/ops.cpp``): without a tensor scale the squared error of
    weights of standard deviation 0.005 is 2.05 times as large (tests/schemes/test_reference.py).

    Args:
        name: ``mode`` of this form.
        tensor_scale: whether the tensor has a scale of its own.
    """

    bits = (4,)
    group_sizes = (_GROUP,)
    default_bits = 4
    default_group_size = _GROUP
    unreadable_on = ("cpu",)  # MLX's CPU reads E4M3 scales by the primitive FromFP8

    def __init__(self, name: str, tensor_scale: bool) -> None:
        self.name = name
        self._scaled = tensor_scale
        if tensor_scale:
            self.stock_mode = None
            scale = "power-of-two scale per tensor"
        else:
            self.stock_mode = "nvfp4"
            scale = "no tensor scale (as mlx-lm stores it)"
        self.title = f"E2M1 floats, E4M3 scale per 16, {scale}"

    def layout(self, shape: Shape, config: QuantConfig, dtype: str) -> Layout:
        *rows, width = shape
        words = width // 8
        groups = width // _GROUP
        arrays: Layout = {
            "weight": ((*rows, words), "uint32"),
            "scales": ((*rows, groups), "uint8"),
        }
        if self._scaled:
            arrays["global_scale"] = ((), "float32")
        return arrays

    def quantize(self, weight: mx.array, config: QuantConfig) -> PackedArrays:
        if not self._scaled:
            packed, scales, *_ = mx.quantize(weight, mode="nvfp4")
            return {"weight": packed, "scales": scales}
        amax = mx.abs(weight).max()
        factor = _tensor_factor(amax)
        scaled = weight.astype(mx.float32) * factor
        packed, scales, *_ = mx.quantize(scaled, mode="nvfp4")
        tensor_scale = _FULL / factor
        return {"weight": packed, "scales": scales, "global_scale": tensor_scale}

    def dequantize(self, packed: PackedArrays, config: QuantConfig, dtype: mx.Dtype) -> mx.array:
        codes = packed["weight"]
        scales = packed["scales"]
        values = mx.dequantize(codes, scales, mode="nvfp4", dtype=mx.float32)
        if self._scaled:
            inverse = packed["global_scale"] / _FULL
            values = values * inverse
        return values.astype(dtype)

    def dequantize_readable(
        self, packed: PackedArrays, config: QuantConfig, dtype: mx.Dtype
    ) -> mx.array:
        # the arrays of ``dequantize`` of mlx/ops.cpp on a CPU: both halves of each byte looked up,
        # scales, product
        codes = packed["weight"]
        rows = codes.shape[:-1]
        table = mx.zeros(16, dtype)
        pairs = codes.reshape(-1, 4).view(mx.int8)
        low_codes = pairs & 15
        high_codes = pairs >> 4
        low = table[low_codes.astype(mx.int8)]
        high = table[high_codes.astype(mx.int8)]
        both = [low[..., None], high[..., None]]
        elements = mx.concatenate(both, -1).reshape(-1, _GROUP)
        scales = packed["scales"].reshape(-1, 1).astype(dtype)
        products = elements * scales
        values = products.reshape(*rows, -1)
        if self._scaled:
            tensor_scale = packed["global_scale"].astype(dtype)
            values = values * (tensor_scale / _FULL)
        return values

    def roundtrip(
        self,
        rows: mx.array,
        config: QuantConfig,
        dtype: mx.Dtype,
        amax: mx.array | None = None,
    ) -> mx.array:
        if not self._scaled:
            return super().roundtrip(rows, config, dtype, amax)
        if amax is None:
            amax = mx.abs(rows).max()
        factor = _tensor_factor(amax)
        scaled = rows.astype(mx.float32) * factor
        packed, scales, *_ = mx.quantize(scaled, mode="nvfp4")
        values = mx.dequantize(packed, scales, mode="nvfp4", dtype=mx.float32)
        unscaled = values / factor
        return unscaled.astype(dtype)


def _tensor_factor(amax: mx.array) -> mx.array:
    """Largest power of two that keeps ``amax`` within 448·6, float32; a tensor of zeros has 1."""
    amax = amax.astype(mx.float32)
    is_zero = amax == 0
    safe = mx.where(is_zero, _FULL, amax)
    ratio = _FULL / safe
    exponent = mx.floor(mx.log2(ratio))
    exponent = mx.clip(exponent, -_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    return mx.power(2.0, exponent)


SHELF = (NvFp4("nvfp4", True), NvFp4("nvfp4_plain", False))
