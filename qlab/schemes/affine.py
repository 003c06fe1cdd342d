"""MLX's own format: unsigned codes with a scale and a bias for each group.

The engine finds it by its mode, ``"affine"``. Knows no model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlab.core.config.quant import Layout, PackedArrays, QuantConfig, Scheme, Shape
from qlab.ops.packing import affine_layout
from qlab.registry import LazyModule

if TYPE_CHECKING:
    import mlx.core as mx

    from qlab.ops import unpack
else:
    mx = LazyModule("mlx.core")
    unpack = LazyModule("qlab.ops.unpack")


class Affine(Scheme):
    """Unsigned integers: ŵ = scale·q + bias, q in 0…2^bits − 1.

    With lo and hi the least and largest weight of a group and n = 2^bits − 1, the scale is
    (hi − lo)/n, made negative unless |lo| > |hi|; the edge of larger magnitude divided by it is
    rounded to q₀, and scale = edge/q₀, bias = edge. So that edge and zero are stored exactly.
    Source: MLX's ``affine_quantize`` (``mlx/ops.cpp``).
    """

    name = "affine"
    title = "unsigned integers, scale and bias per group (MLX's default)"
    bits = (1, 2, 3, 4, 5, 6, 8)
    group_sizes = (32, 64, 128)
    default_bits = 4
    default_group_size = 64
    stock_mode = "affine"

    def layout(self, shape: Shape, config: QuantConfig, dtype: str) -> Layout:
        return affine_layout(shape, config, dtype)

    def quantize(self, weight: mx.array, config: QuantConfig) -> PackedArrays:
        packed, scales, biases = mx.quantize(weight, config.group_size, config.bits)
        return {"weight": packed, "scales": scales, "biases": biases}

    def dequantize(self, packed: PackedArrays, config: QuantConfig, dtype: mx.Dtype) -> mx.array:
        # ``mx.dequantize`` computes in the scales' dtype, but MLX's products with codes do not
        # round there: so float32 is not rounded here either
        arrays = [packed["scales"].astype(dtype), packed["biases"].astype(dtype)]
        return unpack.affine(packed["weight"], arrays, config.bits, config.group_size, dtype)


SHELF = (Affine(),)
