"""Text for calibration and evaluation.

The embedded one, a string, a file, rows, or a ``datasets`` set. Knows no model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import mlx.core as mx

from qlab.core.train.rows import foreign
from qlab.engine.data.conversation import Fault, a
from qlab.engine.data.sources import Text, numbered, path_of, rows_of
from qlab.errors import DataError
from qlab.runtime.paths import ASSETS


def token_batches(
    tokens: list[int], length: int, limit: int, first: list[int] | None = None
) -> list[mx.array]:
    """Cut text into rows of at most ``length`` tokens, up to ``limit`` tokens in all.

    Args:
        tokens: token ids of the text.
        length: tokens in a row; the last row may be shorter, but has at least two.
        limit: tokens in all.
        first: ids put before every row, such as the beginning-of-text token.

    Returns:
        Arrays ``(1, T)`` of int32.
    """
    head = first or []
    body = tokens[:limit]
    step = length - len(head)
    rows = [head + body[i : i + step] for i in range(0, len(body), step)]
    return [mx.array([row], mx.int32) for row in rows if len(row) > 1]


ROW_TOKENS = 128
_KEYS = ("text", "content", "prompt")


def read_text(source: Any, embedded: str, limit: int) -> tuple[str, str]:
    """Return text and what to call it.

    Args:
        source: None for the embedded text, a path, a string, or rows (strings, or dicts with
            ``text``).
        embedded: file name of the embedded text.
        limit: characters to read.

    Raises:
        DataError: there is no text in it; names the row and its keys.
    """
    if source is None:
        return (ASSETS / embedded).read_text(encoding="utf-8")[:limit], "embedded text"
    found = rows_of(source, plain=True)
    path = path_of(source)
    text = found if isinstance(found, Text) else _join(_rows(found), limit)
    if not text.strip():
        raise DataError("The text is empty; give at least a few sentences.")
    return text[:limit], path.name if path is not None else "your text"


def _rows(source: Iterable[Any]) -> Iterator[str]:
    for number, row in numbered(source):
        if isinstance(row, str):
            yield row
            continue
        if isinstance(row, Fault):  # of the line that it should stand in
            raise DataError(f"Row {number} cannot be used: {row}.")
        key = next(
            (k for k in _KEYS if isinstance(row, Mapping) and isinstance(row.get(k), str)), None
        )
        if key is None:
            held = ", ".join(map(repr, row)) if isinstance(row, Mapping) else a(row)
            raise DataError(
                f"Row {number} has no text: it needs a string under {_KEYS[0]!r}, but has {held}."
            )
        yield row[key]


def _join(rows: Iterator[str], limit: int) -> str:
    parts = []
    length = 0
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
        DataError: there is no text, it has fewer than two tokens, or one that the model does not
            know.
    """
    text, words = read_text(source, embedded, 16 * tokens)
    ids = tokenizer.encode(text, add_special_tokens=False)[:tokens]
    if fault := foreign(ids, vocabulary):
        raise DataError(f"The text cannot be used: {fault}.")
    first = tokenizer.bos_token_id
    rows = token_batches(ids, ROW_TOKENS, tokens, [] if first is None else [first])
    if not rows:
        raise DataError("The text has fewer than two tokens; give at least a few sentences.")
    return rows, f"{words}, {sum(row.size for row in rows)} tokens"
