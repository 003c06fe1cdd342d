"""OCP microscaling formats mxfp4 and mxfp8: small floats with a power-of-two scale per 32.

Source: OCP Microscaling Formats (MX) Specification v1.0, sections 5 and 6, as MLX's kernels have
it. Knows no model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlab.core.config.quant import Layout, PackedArrays, QuantConfig, Scheme, Shape
from qlab.registry import LazyModule

if TYPE_CHECKING:
    import mlx.core as mx
else:
    mx = LazyModule("mlx.core")

_GROUP = 32
# MLX wraps the exponent of a group below 2^-127·448: its values come back as NaN or 1e36
_SMALLEST = 2.0**-118
_EXPONENT_BIAS = 127.0  # of an E8M0 scale: the byte e stands for 2^(e − 127)


class MxFp(Scheme):
    """Small floats that share a power-of-two (E8M0) scale in groups of 32.

    MLX's scale is 2^ceil(log2(amax / largest element)) from 0.32.4 on, which never saturates;
    earlier versions rounded the exponent, so codes made by different MLX versions differ. The
    version is recorded when a model is saved.

    Args:
        bits: 4 or 8.
        element: name of the element format, ``"E2M1"`` or ``"E4M3"``.
    """

    group_sizes = (_GROUP,)
    default_group_size = _GROUP

    def __init__(self, bits: int, element: str) -> None:
        self.name = f"mxfp{bits}"
        self.stock_mode = self.name
        self.title = f"OCP microscaling: {element} floats, power-of-two scale per 32"
        self.bits = (bits,)
        self.default_bits = bits
        # MLX's CPU reads E4M3 elements by the primitive FromFP8
        self.unreadable_on = ("cpu",) if element == "E4M3" else ()

    def layout(self, shape: Shape, config: QuantConfig, dtype: str) -> Layout:
        *rows, width = shape
        words = width * config.bits // 32
        groups = width // _GROUP
        return {
            "weight": ((*rows, words), "uint32"),
            "scales": ((*rows, groups), "uint8"),
        }

    def quantize(self, weight: mx.array, config: QuantConfig) -> PackedArrays:
        is_tiny = mx.abs(weight) < _SMALLEST
        weight = mx.where(is_tiny, 0, weight)
        packed, scales, *_ = mx.quantize(weight, mode=self.name)
        return {"weight": packed, "scales": scales}

    def dequantize(self, packed: PackedArrays, config: QuantConfig, dtype: mx.Dtype) -> mx.array:
        codes = packed["weight"]
        scales = packed["scales"]
        return mx.dequantize(codes, scales, mode=self.name, dtype=dtype)

    def dequantize_readable(
        self, packed: PackedArrays, config: QuantConfig, dtype: mx.Dtype
    ) -> mx.array:
        # the arrays of mlx/ops.cpp's ``dequantize`` on a CPU: elements, scales, their product
        codes = packed["weight"]
        rows = codes.shape[:-1]
        elements = codes.view(mx.uint8).astype(dtype)
        elements = elements.reshape(-1, _GROUP)
        exponents = packed["scales"].reshape(-1, 1).astype(dtype)
        base = mx.array(2.0, dtype)
        exponent_bias = mx.array(_EXPONENT_BIAS, dtype)
        scales = mx.power(base, exponents - exponent_bias)
        values = elements * scales
        return values.reshape(*rows, -1)


SHELF = (MxFp(4, "E2M1"), MxFp(8, "E4M3"))
