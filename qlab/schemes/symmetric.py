"""Signed integers with one scale per group, in MLX's affine layout so that its kernels read them.

Knows no model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlab.core.config.quant import Layout, PackedArrays, QuantConfig, Scheme, Shape
from qlab.ops.packing import affine_layout, pack
from qlab.registry import LazyModule

if TYPE_CHECKING:
    import mlx.core as mx
else:
    mx = LazyModule("mlx.core")


class Symmetric(Scheme):
    """Signed integers: ŵ = s·q with s = max|w| / (2^(bits−1) − 1) over the group.

    q lies in −(2^(bits−1) − 1)…2^(bits−1) − 1; the lowest code −2^(bits−1) is never produced, so
    that the range is the same on both sides of zero.

    It is stored as the unsigned code u = q + 2^(bits−1) with bias −2^(bits−1)·s, since
    s·u − 2^(bits−1)·s = s·q. So it costs the bytes of ``affine`` although the bias carries nothing.
    """

    name = "symmetric"
    title = "signed integers, one scale per group, in MLX's affine layout"
    bits = (2, 3, 4, 5, 6, 8)
    group_sizes = (32, 64, 128)
    default_bits = 4
    default_group_size = 64
    stock_mode = "affine"

    def layout(self, shape: Shape, config: QuantConfig, dtype: str) -> Layout:
        return affine_layout(shape, config, dtype)

    def quantize(self, weight: mx.array, config: QuantConfig) -> PackedArrays:
        # (…, out, in) → (…, out, groups, group_size)
        groups = weight.astype(mx.float32)
        groups = groups.reshape(*weight.shape[:-1], -1, config.group_size)
        half = 2 ** (config.bits - 1)
        # the scale is rounded to what is stored before codes are chosen; its half-range multiple is
        # then exact
        scales = (mx.abs(groups).max(-1) / (half - 1)).astype(weight.dtype)
        divisor = mx.where(scales == 0, 1, scales).astype(mx.float32)
        signed = mx.clip(mx.round(groups / divisor[..., None]), 1 - half, half - 1)
        codes = (signed + half).astype(mx.uint32).reshape(weight.shape)
        return {
            "weight": pack(codes, config.bits),
            "scales": scales,
            "biases": scales * -half,
        }

    def dequantize(self, packed: PackedArrays, config: QuantConfig, dtype: mx.Dtype) -> mx.array:
        # ``mx.dequantize`` computes in the scales' dtype, but MLX's products with codes do not
        # round there: so float32 is not rounded here either
        scales = packed["scales"].astype(dtype)
        biases = packed["biases"].astype(dtype)
        return mx.dequantize(packed["weight"], scales, biases, config.group_size, config.bits)


SHELF = (Symmetric(),)
