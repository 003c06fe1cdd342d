"""Text for calibration and evaluation: embedded, a string, a file, rows, a ``datasets`` set.

Solvers, judging and adapter initialization call ``batches`` for token rows of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import mlx.core as mx

from qlab.core.train.rows import outside_vocabulary
from qlab.engine.data.conversation import Fault, type_name
from qlab.engine.data.sources import Text, numbered, path_of, rows_of
from qlab.errors import DataError
from qlab.runtime.paths import ASSETS

ROW_TOKENS = 128
_KEYS = ("text", "content", "prompt")
_MOST_CHARACTERS = 16  # read for each token that is wanted; a token is seldom longer
_TOO_SHORT = "The text has fewer than two tokens; give at least a few sentences."


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
    rows = [head + body[start : start + step] for start in range(0, len(body), step)]
    return [mx.array([row], mx.int32) for row in rows if len(row) > 1]


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
    rows = rows_of(source, plain=True)
    text = rows if isinstance(rows, Text) else _join(_texts(rows), limit)
    if not text.strip():
        raise DataError("The text is empty; give at least a few sentences.")
    path = path_of(source)
    name = "your text" if path is None else path.name
    return text[:limit], name


def _texts(rows: Iterable[Any]) -> Iterator[str]:
    """Yield the text of each row."""
    for number, row in numbered(rows):
        if isinstance(row, Fault):  # of the line that it should stand in
            raise DataError(f"Row {number} cannot be used: {row}.")
        text = row if isinstance(row, str) else _text_of(row)
        if text is None:
            keys = type_name(row)
            if isinstance(row, Mapping):
                keys = ", ".join(map(repr, row))
            needs = f"it needs a string under {_KEYS[0]!r}, but has {keys}"
            raise DataError(f"Row {number} has no text: {needs}.")
        yield text


def _text_of(row: Any) -> str | None:
    """The first of the keys that holds a string."""
    if not isinstance(row, Mapping):
        return None
    texts = (row.get(key) for key in _KEYS)
    return next((text for text in texts if isinstance(text, str)), None)


def _join(texts: Iterator[str], limit: int) -> str:
    """Join texts until they have ``limit`` characters; the rest of a long set is not read."""
    parts = []
    length = 0
    for text in texts:
        parts.append(text)
        length += len(text)
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
    text, name = read_text(source, embedded, _MOST_CHARACTERS * tokens)
    ids = tokenizer.encode(text, add_special_tokens=False)[:tokens]
    fault = outside_vocabulary(ids, vocabulary)
    if fault:
        raise DataError(f"The text cannot be used: {fault}.")
    first = tokenizer.bos_token_id
    head = [] if first is None else [first]
    rows = token_batches(ids, ROW_TOKENS, tokens, head)
    if not rows:
        raise DataError(_TOO_SHORT)
    return rows, f"{name}, {sum(row.size for row in rows)} tokens"
