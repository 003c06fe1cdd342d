"""Packs codes of any width into words, as MLX stores them. Knows no scheme."""

from __future__ import annotations

from typing import Any


def pack(codes: Any, bits: int) -> Any:
    """Pack codes as MLX does: a little-endian bit stream in uint32 words.

    Args:
        codes: uint32 ``(…, n)``, n a multiple of 32.
        bits: bits of a code.

    Returns:
        uint32 ``(…, n·bits/32)``.
    """
    import mlx.core as mx

    runs = codes.reshape(*codes.shape[:-1], -1, 32)
    words: list[Any] = [None] * bits
    for i in range(32):
        word, offset = divmod(i * bits, 32)
        parts = [(word, runs[..., i] << offset)]
        if offset + bits > 32:
            parts.append((word + 1, runs[..., i] >> (32 - offset)))
        for k, part in parts:
            words[k] = part if words[k] is None else words[k] | part
    return mx.stack(words, axis=-1).reshape(*codes.shape[:-1], -1)
