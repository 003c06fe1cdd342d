"""NVFP4: E2M1 elements with an E4M3 scale per 16, with and without a scale of the whole tensor.

Knows no model.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from qlab.core.config.quant import Layout, QuantConfig, Scheme

_FULL = 448.0 * 6.0  # largest E4M3 scale times largest E2M1 element


class NvFp4(Scheme):
    """E2M1 floats sharing an E4M3 scale.

    The group scales of normal LLM weights are subnormal in E4M3.

    With ``tensor_scale`` the tensor is first multiplied by the largest power of two that keeps
    every group scale within 448, and the product is divided by it, both exactly. It is stored as
    MLX's ``global_scale`` = 448·6·2^−k. MLX's quantized linear layer does not take that scale, so
    stock mlx-lm reads only the plain form.

    Args:
        name: ``mode`` of this form.
        tensor_scale: whether the tensor has its own scale.
    """

    bits = (4,)
    group_sizes = (16,)
    default_bits = 4
    default_group_size = 16

    def __init__(self, name: str, tensor_scale: bool) -> None:
        self.name = name
        self._scaled = tensor_scale
        self.stock_mode = None if tensor_scale else "nvfp4"
        self.title = "E2M1 floats, E4M3 scale per 16, " + (
            "power-of-two scale per tensor"
            if tensor_scale
            else "no tensor scale (as mlx-lm stores it)"
        )

    def layout(self, shape: tuple[int, ...], config: QuantConfig, dtype: str) -> Layout:
        made: Layout = {
            "weight": ((*shape[:-1], shape[-1] // 8), "uint32"),
            "scales": ((*shape[:-1], shape[-1] // 16), "uint8"),
        }
        return made | ({"global_scale": ((), "float32")} if self._scaled else {})

    def quantize(self, weight: Any, config: QuantConfig) -> dict[str, Any]:
        if not self._scaled:
            packed, scales = mx.quantize(weight, mode="nvfp4")
            return {"weight": packed, "scales": scales}
        factor = _power(mx.abs(weight).max())
        packed, scales = mx.quantize(weight.astype(mx.float32) * factor, mode="nvfp4")
        return {"weight": packed, "scales": scales, "global_scale": _FULL / factor}

    def dequantize(self, packed: dict[str, Any], config: QuantConfig, dtype: Any) -> Any:
        values = mx.dequantize(packed["weight"], packed["scales"], mode="nvfp4", dtype=mx.float32)
        if self._scaled:
            values = values * (packed["global_scale"] / _FULL)
        return values.astype(dtype)

    def roundtrip(self, rows: Any, config: QuantConfig, amax: Any = None) -> Any:
        if not self._scaled:
            return super().roundtrip(rows, config, amax)
        factor = _power(mx.abs(rows).max() if amax is None else amax)
        packed, scales = mx.quantize(rows.astype(mx.float32) * factor, mode="nvfp4")
        return mx.dequantize(packed, scales, mode="nvfp4", dtype=mx.float32) / factor


def _power(amax: Any) -> Any:
    """Largest power of two that keeps amax within 448·6; 1 for a tensor of zeros. Float32."""
    amax = amax.astype(mx.float32)
    exponent = mx.floor(mx.log2(_FULL / mx.where(amax == 0, _FULL, amax)))
    return mx.power(2.0, mx.clip(exponent, -100, 100))


SHELF = (NvFp4("nvfp4", True), NvFp4("nvfp4_plain", False))
