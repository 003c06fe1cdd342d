"""Text for calibration and evaluation: the embedded one, a string, a file, rows, or a ``datasets`` set. Knows no model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

from qlab.core.rows import foreign
from qlab.engine.evaluate import token_batches
from qlab.engine.load import ASSETS
from qlab.errors import ConfigError, DataError

ROW_TOKENS = 128
_KEYS = ("text", "content", "prompt")


def read_text(source: Any, embedded: str, limit: int) -> tuple[str, str]:
    """Return text and what to call it.

    Args:
        source: None for the embedded text, a path, a string, or rows (strings, or dicts with ``text``).
        embedded: file name of the embedded text.
        limit: characters to read.

    Raises:
        ConfigError: there is no text in it; names the row and its keys.
    """
    if source is None:
        return (ASSETS / embedded).read_text(encoding="utf-8")[:limit], "embedded text"
    if isinstance(source, Path) or (isinstance(source, str) and len(source) < 1024 and Path(source).is_file()):
        return Path(source).read_text(encoding="utf-8")[:limit], Path(source).name
    text = source if isinstance(source, str) else _join(_rows(source), limit)
    if not text.strip():
        raise ConfigError("The text is empty; give at least a few sentences.")
    return text[:limit], "your text"


def _rows(source: Iterable[Any]) -> Iterator[str]:
    for number, row in enumerate(source):
        if isinstance(row, str):
            yield row
            continue
        key = next((k for k in _KEYS if isinstance(row, dict) and isinstance(row.get(k), str)), None)
        if key is None:
            held = ", ".join(map(repr, row)) if isinstance(row, dict) else type(row).__name__
            raise ConfigError(f"Row {number} has no text: it needs a string under {_KEYS[0]!r}, but has {held}.")
        yield row[key]


def _join(rows: Iterator[str], limit: int) -> str:
    parts, length = [], 0
    for row in rows:
        parts.append(row)
        length += len(row)
        if length >= limit:
            break
    return "\n\n".join(parts)


def batches(
    tokenizer: Any, source: Any, embedded: str, tokens: int, vocabulary: int | None = None
) -> tuple[list[mx.array], str]:
    """Return token rows of a text, ``(1, T)`` each, and what the text was, in words.

    Args:
        tokenizer: mlx-lm's wrapper.
        source: see ``read_text``.
        embedded: file name of the embedded text.
        tokens: to use at most.
        vocabulary: tokens that the model knows; None is not checked.

    Raises:
        ConfigError: the text is empty or has fewer than two tokens.
        DataError: the tokenizer makes a token that the model does not know.
    """
    text, words = read_text(source, embedded, 16 * tokens)
    ids = tokenizer.encode(text, add_special_tokens=False)[:tokens]
    if fault := foreign(ids, vocabulary):
        raise DataError(f"The text cannot be used: {fault}.")
    first = tokenizer.bos_token_id
    rows = token_batches(ids, ROW_TOKENS, tokens, [] if first is None else [first])
    if not rows:
        raise ConfigError("The text has fewer than two tokens; give at least a few sentences.")
    return rows, f"{words}, {sum(row.size for row in rows)} tokens"
