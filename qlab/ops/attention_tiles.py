"""Attention in whole tiles of cuDNN's, so that its gradient needs no array of the length squared.

On CUDA MLX takes cuDNN's gradient of attention only at lengths that are multiples of 128
(``ScaledDotProductAttentionVJP::use_fallback``, mlx/backend/cuda); at others it falls back to a
gradient that holds all scores. So queries, keys and values are padded, and the mask lets nothing
see the padding. Used by ``ops/attention.py``.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

TILE = 128  # tokens
_WORTH = 256  # tokens from which on the copies cost less than the scores (docs/log.md)
_WIDEST = 128  # width of a head that cuDNN takes (supports_sdpa_cudnn)


def whole_tiles(
    queries: mx.array, keys: mx.array, values: mx.array, mask: Any
) -> tuple[mx.array, mx.array, mx.array, Any]:
    """Return what attention reads, padded to a length that is a multiple of a tile.

    Nothing sees the padding. Where a mask does not say what is seen, or padding is not worth it,
    all is returned as it is. A causal mask needs no change: padding comes after everything.

    Args:
        queries: ``(batch, heads, length, width)``.
        keys: ``(batch, groups, length, width)``.
        values: ``(batch, groups, length, any)``.
        mask: ``causal`` or an array ``(…, length, length)``, bool or to be added; anything else
            leaves all as it is.
    """
    length = queries.shape[2]
    padding = -length % TILE
    widest = max(queries.shape[-1], values.shape[-1])
    takes_it = widest <= _WIDEST and keys.shape[2] == length and _is_mask(mask, length)
    if not padding or length < _WORTH or not takes_it:
        return queries, keys, values, mask
    pad = [(0, 0), (0, 0), (0, padding), (0, 0)]
    queries = mx.pad(queries, pad)
    keys = mx.pad(keys, pad)
    values = mx.pad(values, pad)
    if isinstance(mask, mx.array):
        mask = _padded_mask(mask, padding)
    return queries, keys, values, mask


def _is_mask(mask: Any, length: int) -> bool:
    """Whether a mask says for each pair of positions what is seen."""
    if isinstance(mask, mx.array):
        return mask.shape[-2:] == (length, length)
    return isinstance(mask, str) and mask == "causal"


def _padded_mask(mask: mx.array, padding: int) -> mx.array:
    """Return a mask ``(…, length, length)`` with columns that nothing sees, and rows that see all.

    A row that sees nothing would give no numbers.
    """
    is_bool = mask.dtype == mx.bool_
    seen = mx.array(True if is_bool else 0.0, mask.dtype)
    unseen = mx.array(False if is_bool else -mx.inf, mask.dtype)
    nothing = (0, 0)
    others = [nothing] * (mask.ndim - 2)
    columns = [*others, nothing, (0, padding)]
    rows = [*others, (0, padding), nothing]
    mask = mx.pad(mask, columns, "constant", unseen)
    return mx.pad(mask, rows, "constant", seen)
