"""NF4 of QLoRA: sixteen quantiles of a Gaussian, scaled per block.

With double quantization the scales are stored in 8 bits, too. Source: Dettmers et al. 2023
(arXiv:2305.14314), section 3, by bitsandbytes' exact rule (``functional.py``,
``csrc/kernels.cu``). Knows no model.
"""

from __future__ import annotations

from functools import cache
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from qlab.core.arithmetic import ceil_div
from qlab.core.config.quant import Layout, PackedArrays, QuantConfig, Scheme, Shape
from qlab.ops.dynamic_map import dynamic_map
from qlab.registry import LazyModule

if TYPE_CHECKING:
    import mlx.core as mx

    from qlab.ops import sums, unpack
else:
    mx = LazyModule("mlx.core")
    sums = LazyModule("qlab.ops.sums")
    unpack = LazyModule("qlab.ops.unpack")

# bitsandbytes' ``get_4bit_type("nf4")``: appendix E of the paper, to the last digit
_TABLE = np.array(
    [
        -1,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1,
    ],
    np.float32,
)
_SMALLEST = 2.0**-126  # smallest normal float32: below it a reciprocal may overflow
_SMALLEST_SCALE = 1e-38  # the same for a second-level scale, as bitsandbytes has it
_BUCKETS = 64  # of −1…1 in the search for a code: each is 1/32 wide
_SCALE_BLOCK = 256  # scales that share a second-level scale


class Nf4(Scheme):
    """Sixteen values: ŵ = T[q]·absmax of the block, T the NF4 table.

    Codes are packed eight to a uint32, the first in the low nibble (bitsandbytes has the first of
    two in the high one).

    Args:
        name: ``mode`` of this form.
        double: whether the scales are themselves quantized to 8 bits, in blocks of 256 around their
            mean.
    """

    bits = (4,)
    group_sizes = (32, 64, 128)
    default_bits = 4
    default_group_size = 64
    stock_mode = None

    def __init__(self, name: str, double: bool) -> None:
        self.name = name
        self._double = double
        scales = "double-quantized scales" if double else "float32 scale per block"
        self.title = f"NormalFloat-4 of QLoRA, {scales}"

    def layout(self, shape: Shape, config: QuantConfig, dtype: str) -> Layout:
        *rows, width = shape
        words = (*rows, width // 8)
        blocks = (*rows, width // config.group_size)
        if not self._double:
            return {"weight": (words, "uint32"), "absmax": (blocks, "float32")}
        scale_blocks = ceil_div(prod(blocks), _SCALE_BLOCK)
        return {
            "weight": (words, "uint32"),
            "absmax": (blocks, "uint8"),
            "absmax_scales": ((scale_blocks,), "float32"),
            "absmax_offset": ((), "float32"),
        }

    def quantize(self, weight: mx.array, config: QuantConfig) -> PackedArrays:
        # (…, out, in) → (…, out, blocks, group_size)
        blocks = weight.astype(mx.float32)
        blocks = blocks.reshape(*weight.shape[:-1], -1, config.group_size)
        absmax = mx.abs(blocks).max(-1)
        # a reciprocal, as bitsandbytes has it; a block too small to have one becomes zeros
        inverse = mx.where(absmax < _SMALLEST, 0.0, 1.0 / mx.maximum(absmax, _SMALLEST))
        codes = _codes(blocks * inverse[..., None]).reshape(weight.shape)
        scales = _quantized_scales(absmax) if self._double else {"absmax": absmax}
        return {"weight": _pack(codes), **scales}

    def take(self, packed: PackedArrays, rows: mx.array) -> PackedArrays:
        if not self._double:
            return super().take(packed, rows)
        absmax = packed["absmax"]
        blocks = absmax.shape[-1]
        # where each scale of the rows stands among all scales, flattened: (…, blocks)
        index = rows[..., None] * blocks + mx.arange(blocks)
        second = packed["absmax_scales"][index // _SCALE_BLOCK]
        table = mx.array(dynamic_map(True))
        scales = mx.take(table, absmax[rows]) * second + packed["absmax_offset"]
        return {"weight": packed["weight"][rows], "absmax": scales}

    def dequantize(self, packed: PackedArrays, config: QuantConfig, dtype: mx.Dtype) -> mx.array:
        # rows that ``take`` has picked have plain scales in either form
        double = "absmax_scales" in packed
        absmax = _dequantized_scales(packed) if double else packed["absmax"]
        return _unpack()(packed["weight"], [absmax], 4, config.group_size, dtype)

    def roundtrip(
        self,
        rows: mx.array,
        config: QuantConfig,
        dtype: mx.Dtype,
        amax: mx.array | None = None,
    ) -> mx.array:
        if not self._double or amax is None:
            return super().roundtrip(rows, config, dtype)
        # the mean of the scales is each tensor's own: a stack is cut where another tensor begins,
        # which is where the largest magnitude changes
        largest = np.array(amax).reshape(-1)
        cuts = np.flatnonzero(np.diff(largest)) + 1
        tensors = mx.split(rows, cuts.tolist())
        values = [super(Nf4, self).roundtrip(part, config, dtype) for part in tensors]
        return mx.concatenate(values)


@cache
def _unpack() -> unpack.Unpack:
    """What turns codes into values of the table; one object, since its kernel is built once."""
    return unpack.lookup(_TABLE)


def _codes(scaled: mx.array) -> mx.array:
    """Return the code of the nearest value of the table for values in −1…1; uint32.

    That is the number of midpoints of the table strictly below the value. A bucket of width 1/32
    holds at most one midpoint, so one look-up and one comparison decide.
    """
    base, edge = (mx.array(table) for table in _buckets())
    # as integers, so that a weight that is not a number reads no foreign memory
    bucket = (mx.maximum(scaled + 1, 0) * (_BUCKETS / 2)).astype(mx.uint32)
    bucket = mx.minimum(bucket, _BUCKETS - 1)
    return mx.take(base, bucket) + (scaled > mx.take(edge, bucket)).astype(mx.uint32)


@cache
def _buckets() -> tuple[np.ndarray, np.ndarray]:
    """Of each bucket of −1…1: midpoints below it, uint32, and the midpoint inside, float32.

    The midpoint is infinite where none is inside. Both ``(64,)``.
    """
    midpoints = (_TABLE[1:] + _TABLE[:-1]) / np.float32(2)
    edges = np.arange(_BUCKETS) / (_BUCKETS / 2) - 1
    base = np.searchsorted(midpoints, edges).astype(np.uint32)
    return base, np.append(midpoints, np.float32(np.inf))[base]


def _pack(codes: mx.array) -> mx.array:
    """Eight 4-bit codes to a uint32, ``(…, in)`` → ``(…, in / 8)``; the first is lowest."""
    runs = codes.reshape(*codes.shape[:-1], -1, 8)
    shifts = mx.arange(0, 32, 4, dtype=mx.uint32)
    return (runs << shifts).sum(-1).astype(mx.uint32)


def _quantized_scales(absmax: mx.array) -> PackedArrays:
    """Quantize the scales of a tensor to 8 bits (the paper's double quantization).

    Scales less their mean, flattened, in blocks of 256: each block has a second-level scale, its
    largest magnitude, and each quotient becomes the nearest value of the signed dynamic map.

    Args:
        absmax: float32 ``(…, out, blocks)``.

    Returns:
        Codes, second-level scales and mean, by parameter name.
    """
    offset = sums.stable_sum(absmax) / absmax.size
    flat = (absmax - offset).reshape(-1)
    padded = mx.pad(flat, (0, -flat.size % _SCALE_BLOCK)).reshape(-1, _SCALE_BLOCK)
    second = mx.abs(padded).max(1)
    safe = mx.maximum(second, _SMALLEST_SCALE)[:, None]
    # bitsandbytes multiplies whole blocks by a reciprocal and divides the last, shorter one
    whole = flat.size // _SCALE_BLOCK * _SCALE_BLOCK
    multiplied = (padded * (1.0 / safe)).reshape(-1)[:whole]
    divided = (padded / safe).reshape(-1)[whole : flat.size]
    scaled = np.clip(np.array(mx.concatenate([multiplied, divided])), -1, 1)
    table = dynamic_map(True)
    midpoints = (table[1:] + table[:-1]) / np.float32(2)
    codes = np.searchsorted(midpoints, scaled).astype(np.uint8)
    return {
        "absmax": mx.array(codes).reshape(absmax.shape),
        "absmax_scales": second,
        "absmax_offset": offset,
    }


def _dequantized_scales(packed: PackedArrays) -> mx.array:
    """Return the float32 scales ``(…, out, blocks)`` that double quantization stands for."""
    codes = packed["absmax"]
    values = mx.take(mx.array(dynamic_map(True)), codes.reshape(-1))
    # the last block of scales may be shorter
    second = mx.repeat(packed["absmax_scales"], _SCALE_BLOCK)[: values.size]
    return (values * second + packed["absmax_offset"]).reshape(codes.shape)


SHELF = (Nf4("nf4", False), Nf4("nf4_dq", True))
