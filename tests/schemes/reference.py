"""Numpy references of the formats, written from their definitions and independent of MLX."""

from __future__ import annotations

import numpy as np

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16, ties to even; returned as float32."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


ROUND = {
    "float32": np.float32,
    "bfloat16": to_bfloat16,
    "float16": lambda x: x.astype(np.float16).astype(np.float32),
}


def affine(
    w: np.ndarray, bits: int, group: int, dtype: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and biases of MLX's affine format: range from the data, zero and the larger edge exact.

    Codes are chosen with unrounded scale and bias, which are then rounded to the weight's dtype.
    """
    g = w.reshape(-1, group).astype(np.float32)
    n = np.float32(2**bits - 1)
    low, high = g.min(1), g.max(1)
    if bits == 1:  # the two codes are the ends of the range
        scale = np.maximum(high - low, np.float32(1e-7))
        codes = np.clip(np.round((g - low[:, None]) / scale[:, None]), 0, 1)
        return codes.astype(np.uint32).reshape(w.shape), ROUND[dtype](scale), ROUND[dtype](low)
    scale = np.maximum((high - low) / n, np.float32(1e-7))
    low_is_larger = np.abs(low) > np.abs(high)
    scale = np.where(low_is_larger, scale, -scale)
    edge = np.where(low_is_larger, low, high)
    q0 = np.round(edge / scale)
    some = q0 != 0
    scale = np.where(some, edge / np.where(some, q0, 1), scale).astype(np.float32)
    bias = np.where(some, edge, 0).astype(np.float32)
    codes = np.clip(np.round((g - bias[:, None]) / scale[:, None]), 0, n)
    return codes.astype(np.uint32).reshape(w.shape), ROUND[dtype](scale), ROUND[dtype](bias)


def symmetric(w: np.ndarray, bits: int, group: int, dtype: str) -> np.ndarray:
    """Values of signed integers with one scale max|w|/(2^(N−1)−1) per group, rounded as stored."""
    g = w.reshape(-1, group).astype(np.float32)
    top = 2 ** (bits - 1) - 1
    scale = ROUND[dtype]((np.abs(g).max(1) / np.float32(top)).astype(np.float32))[:, None]
    codes = np.clip(np.round(g / np.where(scale == 0, 1, scale)), -top, top)
    return (codes * scale).reshape(w.shape)


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Read a little-endian bit stream of codes from uint32 words, row by row."""
    stream = np.unpackbits(np.ascontiguousarray(packed).view(np.uint8), axis=-1, bitorder="little")
    codes = stream.reshape(packed.shape[0], -1, bits)[:, :count]
    return (codes.astype(np.uint32) << np.arange(bits, dtype=np.uint32)).sum(-1).astype(np.uint32)


def nearest(x: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Distance of each value to the nearest point of a grid and its negatives."""
    both = np.concatenate([grid, -grid])
    return np.abs(x[..., None] - both).min(-1)


def nearest_value(x: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Point of a grid nearest to each value."""
    return grid[np.abs(x[..., None] - grid).argmin(-1)]


def e4m3() -> np.ndarray:
    """All non-negative finite values of E4M3 (OCP FP8): bias 7, largest 448."""
    subnormal = np.arange(8) / 8 * 2.0**-6
    normal = [
        (1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)
    ]
    return np.concatenate([subnormal, normal]).astype(np.float32)


def mxfp_scale(amax: np.ndarray, largest: float) -> np.ndarray:
    """Power-of-two scale that never saturates: 2^ceil(log2(amax / largest element))."""
    return 2.0 ** np.ceil(np.log2(amax / largest))
