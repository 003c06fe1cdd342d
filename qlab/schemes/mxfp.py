"""OCP microscaling formats mxfp4 and mxfp8: small floats with a power-of-two scale per 32.

Knows no model.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from qlab.core.config.quant import Layout, QuantConfig, Scheme

_SMALLEST = 2.0**-118


class MxFp(Scheme):
    """Small floats sharing an E8M0 scale (OCP Microscaling Formats v1.0, §5–6), by MLX's kernels.

    MLX's scale is 2^ceil(log2(amax/largest element)) from 0.32.4 on, which never saturates; earlier
    versions rounded the exponent, so codes made by different MLX versions differ. The version is
    recorded when a model is saved.

    Args:
        bits: 4 or 8.
        element: name of the element format.
    """

    group_sizes = (32,)
    default_group_size = 32

    def __init__(self, bits: int, element: str) -> None:
        self.name = self.stock_mode = f"mxfp{bits}"
        self.title = f"OCP microscaling: {element} floats, power-of-two scale per 32"
        self.bits = (bits,)
        self.default_bits = bits

    def layout(self, shape: tuple[int, ...], config: QuantConfig, dtype: str) -> Layout:
        codes = (*shape[:-1], shape[-1] * config.bits // 32)
        return {"weight": (codes, "uint32"), "scales": ((*shape[:-1], shape[-1] // 32), "uint8")}

    def quantize(self, weight: Any, config: QuantConfig) -> dict[str, Any]:
        # MLX wraps the exponent of a group below 2^-127·448: its values come back as NaN or 1e36
        weight = mx.where(mx.abs(weight) < _SMALLEST, 0, weight)
        packed, scales = mx.quantize(weight, mode=self.name)
        return {"weight": packed, "scales": scales}

    def dequantize(self, packed: dict[str, Any], config: QuantConfig, dtype: Any) -> Any:
        return mx.dequantize(packed["weight"], packed["scales"], mode=self.name, dtype=dtype)


SHELF = (MxFp(4, "E2M1"), MxFp(8, "E4M3"))
