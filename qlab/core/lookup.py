"""Codes of four bits → values of a table of sixteen, each times the scale of its group: in one pass where MLX has a GPU.

One by one the operations write and read a float32 array of the weight's size first. Knows no scheme and no model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property
from math import gcd
from typing import Any

import mlx.core as mx
import numpy as np

_CODES = 8  # in a uint32
_INDEX = {
    "cuda": "size_t i = cooperative_groups::this_grid().thread_rank();",
    "metal": "size_t i = thread_position_in_grid.x;",
}
_BODY = """
    uint32_t word = codes[i];
    float scale = scales[i / WORDS];
    for (int k = 0; k < 8; ++k) {
        out[8 * i + k] = static_cast<T>(table[(word >> (4 * k)) & 15] * scale);
    }
"""

Kernel = Callable[..., list[mx.array]]


class Lookup:
    """A table of sixteen values.

    Args:
        table: float32 ``(16,)``.
    """

    def __init__(self, table: np.ndarray) -> None:
        self._table = np.ascontiguousarray(table, np.float32)

    def weights(self, codes: mx.array, scales: mx.array, group_size: int, dtype: mx.Dtype) -> mx.array:
        """Return ``table[code]·scale``, computed in float32, in ``dtype``.

        Args:
            codes: uint32 ``(…, in / 8)``, the first code in the lowest bits.
            scales: float32 ``(…, in / group_size)``.
            group_size: weights that share a scale, a multiple of eight.
            dtype: of what is returned, ``(…, in)``.
        """
        kernel = _kernel() if codes.size else None
        if kernel is None:
            return self.one_by_one(codes, scales, group_size, dtype)
        return self.fused(kernel, codes, scales, group_size, dtype)

    def one_by_one(self, codes: mx.array, scales: mx.array, group_size: int, dtype: mx.Dtype) -> mx.array:
        """Do the same by MLX's own operations."""
        pairs = mx.take(mx.array(self._pairs), codes.view(mx.uint8)).view(mx.float32)
        groups = pairs.reshape(*codes.shape[:-1], -1, group_size) * scales[..., None]
        return groups.reshape(*codes.shape[:-1], -1).astype(dtype)

    def fused(self, kernel: Kernel, codes: mx.array, scales: mx.array, group_size: int, dtype: mx.Dtype) -> mx.array:
        """Do the same by a kernel."""
        return kernel(
            inputs=[codes, scales, mx.array(self._table)],
            template=[("T", dtype), ("WORDS", group_size // _CODES)],
            grid=(codes.size, 1, 1),
            threadgroup=(gcd(codes.size, 256), 1, 1),  # whole groups of threads only: none looks beyond the end
            output_shapes=[(*codes.shape[:-1], codes.shape[-1] * _CODES)],
            output_dtypes=[dtype],
        )[0]

    def agrees(self, kernel: Kernel) -> bool:
        """Whether a kernel gives the very numbers that MLX's operations give, tried on a few rows."""
        codes = mx.arange(96, dtype=mx.uint32).reshape(3, 32) * mx.array(2654435761, mx.uint32)
        scales = mx.linspace(0.01, 2.0, 3 * 8).reshape(3, 8)
        try:
            return all(
                mx.array_equal(self.fused(kernel, codes, scales, 32, d), self.one_by_one(codes, scales, 32, d)).item()
                for d in (mx.float32, mx.bfloat16, mx.float16)
            )
        except (RuntimeError, ValueError):  # it does not compile here
            return False

    @cached_property
    def _pairs(self) -> np.ndarray:
        """Both values of every byte of two codes, as one uint64, so that one look-up reads two."""
        byte = np.arange(256)
        return np.stack([self._table[byte & 15], self._table[byte >> 4]], 1).view(np.uint64)[:, 0]


@cache
def _kernel() -> Kernel | None:
    """Return the kernel of this back end, if there is one and its numbers are right."""
    if mx.default_device() == mx.cpu:
        return None
    name = "metal" if mx.metal.is_available() else "cuda"
    make: Any = mx.fast.metal_kernel if name == "metal" else mx.fast.cuda_kernel
    kernel = make(
        name="qlab_lookup", input_names=["codes", "scales", "table"], output_names=["out"], source=_INDEX[name] + _BODY
    )
    return kernel if Lookup(np.linspace(-1, 1, 16)).agrees(kernel) else None
