"""Attention in whole tiles of cuDNN's, so that its way back needs no array of the length squared. Knows no model."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

TILE = 128  # tokens; MLX takes cuDNN's way back at multiples of it only (ScaledDotProductAttentionVJP::use_fallback)
_WORTH = 256  # tokens from which on the copies cost less than the squares (docs/log.md)
_WIDEST = 128  # head that cuDNN takes (supports_sdpa_cudnn)


def in_tiles(
    queries: mx.array, keys: mx.array, values: mx.array, *, mask: mx.array | str | None = None, **others: Any
) -> mx.array:
    """Return ``mx.fast.scaled_dot_product_attention``, computed at a length that is a multiple of a tile.

    What is added comes behind everything, so nothing sees it; where a mask does not say that, nothing is added.

    Args:
        queries: ``(batch, heads, length, width)``.
        keys: ``(batch, groups, length, width)``.
        values: ``(batch, groups, length, its width)``.
        mask: ``causal`` or an array ``(…, length, length)``, bool or to be added.
        others: scale, sinks.

    Returns:
        ``(batch, heads, length, width of the values)``.
    """
    length = queries.shape[2]
    more = -length % TILE
    hidden = isinstance(mask, mx.array) and mask.shape[-2:] == (length, length) or mask == "causal"
    wide = max(queries.shape[-1], values.shape[-1]) > _WIDEST
    if more and hidden and not wide and length >= _WORTH and keys.shape[2] == length:
        queries, keys, values = (mx.pad(array, [(0, 0), (0, 0), (0, more), (0, 0)]) for array in (queries, keys, values))
        mask = _longer(mask, more) if isinstance(mask, mx.array) else mask
    return mx.fast.scaled_dot_product_attention(queries, keys, values, mask=mask, **others)[:, :, :length]


def _longer(mask: mx.array, more: int) -> mx.array:
    """Add columns that nothing sees, and rows that see everything: a row that sees nothing has no numbers."""
    seen, unseen = (mx.array(x, mask.dtype) for x in ((True, False) if mask.dtype == mx.bool_ else (0.0, -mx.inf)))
    others = [(0, 0)] * (mask.ndim - 2)
    mask = mx.pad(mask, [*others, (0, 0), (0, more)], "constant", unseen)
    return mx.pad(mask, [*others, (0, more), (0, 0)], "constant", seen)
