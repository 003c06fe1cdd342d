"""Attention in whole tiles of cuDNN's, so that its way back needs no array of the length squared.

Knows no model.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

# tokens; MLX takes cuDNN's way back at multiples of it only
# (ScaledDotProductAttentionVJP::use_fallback)
TILE = 128
_WORTH = 256  # tokens from which on the copies cost less than the squares (docs/log.md)
_WIDEST = 128  # head that cuDNN takes (supports_sdpa_cudnn)


def whole_tiles(
    queries: mx.array, keys: mx.array, values: mx.array, mask: Any
) -> tuple[mx.array, mx.array, mx.array, Any]:
    """Return what attention reads at a length that is a multiple of a tile, what is added behind
    being seen by nothing.

    Where a mask does not say what is seen, or it is not worth it, nothing is added.

    Args:
        queries: ``(batch, heads, length, width)``.
        keys: ``(batch, groups, length, width)``.
        values: ``(batch, groups, length, any)``.
        mask: ``causal`` or an array ``(…, length, length)``, bool or to be added; anything else
            leaves all as it is.
    """
    length = queries.shape[2]
    widest = max(queries.shape[-1], values.shape[-1])
    more = -length % TILE
    sees = (
        isinstance(mask, mx.array)
        and mask.shape[-2:] == (length, length)
        or isinstance(mask, str)
        and mask == "causal"
    )
    if not (more and sees and length >= _WORTH and widest <= _WIDEST and keys.shape[2] == length):
        return queries, keys, values, mask
    queries, keys, values = (
        mx.pad(array, [(0, 0), (0, 0), (0, more), (0, 0)]) for array in (queries, keys, values)
    )
    return queries, keys, values, _longer(mask, more) if isinstance(mask, mx.array) else mask


def _longer(mask: mx.array, more: int) -> mx.array:
    """Add columns that nothing sees, and rows that see everything.

    A row that sees nothing has no numbers.
    """
    seen, unseen = (
        mx.array(x, mask.dtype)
        for x in ((True, False) if mask.dtype == mx.bool_ else (0.0, -mx.inf))
    )
    others = [(0, 0)] * (mask.ndim - 2)
    mask = mx.pad(mask, [*others, (0, 0), (0, more)], "constant", unseen)
    return mx.pad(mask, [*others, (0, more), (0, 0)], "constant", seen)
