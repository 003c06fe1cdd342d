"""MLX's own format: unsigned codes with a scale and a bias per group. Knows no model."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from qlab.core.config.quant import Layout, QuantConfig, Scheme
from qlab.ops.unpack import affine


class Affine(Scheme):
    """w ≈ scale·q + bias, q in 0…2^bits−1.

    Zero and the edge of larger magnitude are exact (mlx ``affine_quantize``).
    """

    name = "affine"
    title = "unsigned integers, scale and bias per group (MLX's default)"
    bits = (1, 2, 3, 4, 5, 6, 8)
    group_sizes = (32, 64, 128)
    default_bits = 4
    default_group_size = 64
    stock_mode = "affine"

    def layout(self, shape: tuple[int, ...], config: QuantConfig, dtype: str) -> Layout:
        groups = (*shape[:-1], shape[-1] // config.group_size)
        codes = (*shape[:-1], shape[-1] * config.bits // 32)
        return {"weight": (codes, "uint32"), "scales": (groups, dtype), "biases": (groups, dtype)}

    def quantize(self, weight: Any, config: QuantConfig) -> dict[str, Any]:
        packed, scales, biases = mx.quantize(weight, config.group_size, config.bits)
        return {"weight": packed, "scales": scales, "biases": biases}

    def dequantize(self, packed: dict[str, Any], config: QuantConfig, dtype: Any) -> Any:
        # MLX computes in the scales' dtype; its matrix products do not round there, so float32 is
        # asked for here too
        arrays = [packed[name].astype(dtype) for name in ("scales", "biases")]
        return affine(packed["weight"], arrays, config.bits, config.group_size, dtype)


SHELF = (Affine(),)
