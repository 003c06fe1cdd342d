"""NF4 of QLoRA: sixteen quantiles of a Gaussian, scaled per block.

Optionally with double-quantized scales.

Knows no model. Source: bitsandbytes' exact rule (``functional.py``, ``csrc/kernels.cu``); paper
arXiv:2305.14314 §3.
"""

from __future__ import annotations

from functools import cache
from math import prod
from typing import Any

import mlx.core as mx
import numpy as np

from qlab.core.config.quant import Layout, QuantConfig, Scheme
from qlab.ops.dynamic_map import dynamic_map
from qlab.ops.unpack import lookup

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
_UNPACK = lookup(_TABLE)
_SMALLEST = 2.0**-126  # smallest normal float32: below it a reciprocal may overflow
_BUCKETS = 64
_SCALE_BLOCK = 256  # scales that share a second-level scale


class Nf4(Scheme):
    """w ≈ T[q]·absmax of its block, T the NF4 table.

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
        self.title = "NormalFloat-4 of QLoRA, " + (
            "double-quantized scales" if double else "float32 scale per block"
        )

    def layout(self, shape: tuple[int, ...], config: QuantConfig, dtype: str) -> Layout:
        codes = (*shape[:-1], shape[-1] // 8)
        blocks = (*shape[:-1], shape[-1] // config.group_size)
        made: Layout = {
            "weight": (codes, "uint32"),
            "absmax": (blocks, "uint8" if self._double else "float32"),
        }
        if self._double:
            made |= {
                "absmax_scales": ((-(-prod(blocks) // _SCALE_BLOCK),), "float32"),
                "absmax_offset": ((), "float32"),
            }
        return made

    def quantize(self, weight: Any, config: QuantConfig) -> dict[str, Any]:
        blocks = weight.astype(mx.float32).reshape(*weight.shape[:-1], -1, config.group_size)
        absmax = mx.abs(blocks).max(-1)
        # a reciprocal, as bitsandbytes has it; a block too small to have one becomes zeros
        inverse = mx.where(absmax < _SMALLEST, 0.0, 1.0 / mx.maximum(absmax, _SMALLEST))
        packed = _pack(_codes(blocks * inverse[..., None]).reshape(weight.shape))
        return {"weight": packed, **(_shrink(absmax) if self._double else {"absmax": absmax})}

    def take(self, packed: dict[str, Any], rows: Any) -> dict[str, Any]:
        if not self._double:
            return super().take(packed, rows)
        codes = packed["absmax"]
        index = rows[..., None] * codes.shape[-1] + mx.arange(
            codes.shape[-1]
        )  # of each scale in the flattened scales
        second = packed["absmax_scales"][index // _SCALE_BLOCK]
        values = (
            mx.take(mx.array(dynamic_map(True)), codes[rows]) * second + packed["absmax_offset"]
        )
        return {"weight": packed["weight"][rows], "absmax": values}

    def dequantize(self, packed: dict[str, Any], config: QuantConfig, dtype: Any) -> Any:
        absmax = _grow(packed) if "absmax_scales" in packed else packed["absmax"]
        return _UNPACK(packed["weight"], [absmax], 4, config.group_size, dtype)

    def roundtrip(self, rows: Any, config: QuantConfig, amax: Any = None) -> Any:
        whole = super().roundtrip
        if not self._double or amax is None:
            return whole(rows, config)
        # the mean of the scales is each tensor's own: a stack is cut where another tensor begins
        cuts = np.flatnonzero(np.diff(np.array(amax).reshape(-1))) + 1
        return mx.concatenate([whole(part, config) for part in mx.split(rows, cuts.tolist())])


def _codes(scaled: mx.array) -> mx.array:
    """Return the number of midpoints of the table strictly below each value of −1…1; uint32.

    A value's bucket of 1/32 holds at most one midpoint, so one look-up and one comparison decide.
    """
    base, edge = (mx.array(part) for part in _buckets())
    whole = (mx.maximum(scaled + 1, 0) * (_BUCKETS / 2)).astype(mx.uint32)
    bucket = mx.minimum(
        whole, _BUCKETS - 1
    )  # as integers, so that a weight that is not a number reads no foreign memory
    return mx.take(base, bucket) + (scaled > mx.take(edge, bucket)).astype(mx.uint32)


@cache
def _buckets() -> tuple[np.ndarray, np.ndarray]:
    middle = (_TABLE[1:] + _TABLE[:-1]) / np.float32(2)
    edges = np.arange(_BUCKETS) / (_BUCKETS / 2) - 1
    base = np.searchsorted(middle, edges).astype(np.uint32)
    return base, np.append(middle, np.float32(np.inf))[base]


def _pack(codes: mx.array) -> mx.array:
    runs = codes.reshape(*codes.shape[:-1], -1, 8)
    return (runs << mx.arange(0, 32, 4, dtype=mx.uint32)).sum(-1).astype(mx.uint32)


def _shrink(absmax: mx.array) -> dict[str, mx.array]:
    """Quantize the scales of a tensor to 8 bits.

    Nearest value of the dynamic map, in blocks over the flattened scales.
    """
    offset = absmax.mean()
    flat = (absmax - offset).reshape(-1)
    whole = flat.size // _SCALE_BLOCK * _SCALE_BLOCK
    padded = mx.pad(flat, (0, -flat.size % _SCALE_BLOCK)).reshape(-1, _SCALE_BLOCK)
    second = mx.abs(padded).max(1)
    safe = mx.maximum(second, 1e-38)[:, None]
    # bitsandbytes multiplies whole blocks by a reciprocal and divides the last, shorter one
    scaled = mx.concatenate(
        [
            (padded * (1.0 / safe)).reshape(-1)[:whole],
            (padded / safe).reshape(-1)[whole : flat.size],
        ]
    )
    table = dynamic_map(True)
    middle = (table[1:] + table[:-1]) / np.float32(2)
    codes = np.searchsorted(middle, np.clip(np.array(scaled), -1, 1)).astype(np.uint8)
    return {
        "absmax": mx.array(codes).reshape(absmax.shape),
        "absmax_scales": second,
        "absmax_offset": offset,
    }


def _grow(packed: dict[str, mx.array]) -> mx.array:
    """Return the float32 scales that double quantization stands for."""
    codes = packed["absmax"]
    values = mx.take(mx.array(dynamic_map(True)), codes.reshape(-1))
    scales = mx.repeat(packed["absmax_scales"], _SCALE_BLOCK)[: values.size]
    return (values * scales + packed["absmax_offset"]).reshape(codes.shape)


SHELF = (Nf4("nf4", False), Nf4("nf4_dq", True))
