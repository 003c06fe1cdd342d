"""Signed integers with one scale per group, stored in MLX's affine layout so that its kernels run
it. Knows no model.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from qlab.core.config.quant import Layout, QuantConfig, Scheme
from qlab.ops.packing import pack


class Symmetric(Scheme):
    """w ≈ s·q with s = max|w|/(2^(N−1)−1) and q in −(2^(N−1)−1)…2^(N−1)−1.

    The code −2^(N−1) is never produced.

    Stored as u = q + 2^(N−1) with bias −2^(N−1)·s, so it costs the bytes of affine although the
    bias carries nothing.
    """

    name = "symmetric"
    title = "signed integers, one scale per group, in MLX's affine layout"
    bits = (2, 3, 4, 5, 6, 8)
    group_sizes = (32, 64, 128)
    default_bits = 4
    default_group_size = 64
    stock_mode = "affine"

    def layout(self, shape: tuple[int, ...], config: QuantConfig, dtype: str) -> Layout:
        groups = (*shape[:-1], shape[-1] // config.group_size)
        codes = (*shape[:-1], shape[-1] * config.bits // 32)
        return {"weight": (codes, "uint32"), "scales": (groups, dtype), "biases": (groups, dtype)}

    def quantize(self, weight: Any, config: QuantConfig) -> dict[str, Any]:
        groups = weight.astype(mx.float32).reshape(*weight.shape[:-1], -1, config.group_size)
        half = 2 ** (config.bits - 1)
        # the scale is rounded to what is stored before codes are chosen; its half-range multiple is
        # then exact
        scales = (mx.abs(groups).max(-1) / (half - 1)).astype(weight.dtype)
        divisor = mx.where(scales == 0, 1, scales).astype(mx.float32)[..., None]
        codes = mx.clip(mx.round(groups / divisor), 1 - half, half - 1) + half
        return {
            "weight": pack(codes.astype(mx.uint32).reshape(weight.shape), config.bits),
            "scales": scales,
            "biases": scales * -half,
        }

    def dequantize(self, packed: dict[str, Any], config: QuantConfig, dtype: Any) -> Any:
        # MLX computes in the scales' dtype; its matrix products do not round there, so float32 is
        # asked for here too
        scales, biases = (packed[name].astype(dtype) for name in ("scales", "biases"))
        return mx.dequantize(packed["weight"], scales, biases, config.group_size, config.bits)


SHELF = (Symmetric(),)
