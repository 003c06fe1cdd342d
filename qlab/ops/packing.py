"""MLX's affine format: its arrays, and codes of any width packed into words.

Used by the schemes and solvers that fill it.
"""

from __future__ import annotations

from typing import Any

from qlab.core.config.quant import Layout, QuantConfig, Shape


def affine_layout(shape: Shape, config: QuantConfig, dtype: str) -> Layout:
    """Return shape and dtype of the arrays that MLX's affine format stores.

    Args:
        shape: of the weight, ``(…, out, in)``.
        config: bits and group size.
        dtype: of the weight, which scales and biases take.
    """
    *rows, width = shape
    words = (*rows, width * config.bits // 32)
    groups = (*rows, width // config.group_size)
    return {
        "weight": (words, "uint32"),
        "scales": (groups, dtype),
        "biases": (groups, dtype),
    }


def pack(codes: Any, bits: int) -> Any:
    """Pack codes as MLX does: a little-endian bit stream in uint32 words.

    32 codes of b bits fill exactly b words. Code i begins at bit i·b of these, and may lie across
    two words.

    Args:
        codes: uint32 ``(…, n)``, n a multiple of 32.
        bits: of a code.

    Returns:
        uint32 ``(…, n · bits / 32)``.
    """
    import mlx.core as mx

    outer = codes.shape[:-1]
    runs = codes.reshape(*outer, -1, 32)  # (…, n / 32, 32)
    words: list[Any] = [None] * bits

    def add(number: int, part: Any) -> None:
        before = words[number]
        words[number] = part if before is None else before | part

    for i in range(32):
        word, offset = divmod(i * bits, 32)
        code = runs[..., i]
        add(word, code << offset)
        if offset + bits > 32:
            add(word + 1, code >> (32 - offset))  # the bits that do not fit into the first word
    stream = mx.stack(words, axis=-1)  # (…, n / 32, bits)
    return stream.reshape(*outer, -1)
