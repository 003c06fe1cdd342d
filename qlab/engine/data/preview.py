"""Rows as pieces of text that are trained, masked or cut: what ``Trainer.data`` shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qlab.core.train.data_report import DataReport, ShownRow
from qlab.core.train.rows import Row, Rows
from qlab.engine.data.batches import Feed

_REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no whole character
_MOST_IN_CHARACTER = 4  # tokens that wait for the rest of a character: UTF-8 has at most 4 bytes


def pieces(row: Row, tokenizer: Any) -> list[str]:
    """Return the text of each token; joined, they are the text.

    A character made of several tokens stands with the last.
    """
    return _pieces(row.tokens.tolist(), tokenizer)


def _pieces(tokens: Sequence[int], tokenizer: Any) -> list[str]:
    """Decode each token together with the one before it.

    Some tokenizers drop the space that a text begins with, so a token alone would lose its own.
    """
    texts = []
    context = 0  # first token of the piece before
    done = 0  # tokens whose text has been taken
    last = len(tokens) - 1
    for k in range(len(tokens)):
        known = tokenizer.decode(tokens[context:done]) if done else ""
        text = tokenizer.decode(tokens[context : k + 1])
        is_half_character = text.endswith(_REPLACEMENT) and k - done < _MOST_IN_CHARACTER
        if is_half_character and k < last:
            texts.append("")
            continue
        texts.append(text[len(known) :])
        context = done
        done = k + 1
    return texts


def report(feed: Feed, tokenizer: Any, held: Rows | None = None, first: int = 6) -> DataReport:
    """Return what will be trained on, for a person to check before the first step.

    Args:
        feed: batches of the run.
        tokenizer: mlx-lm's wrapper.
        held: rows held out.
        first: rows to show.
    """
    rows = feed.rows
    trained = {row.digest for row in rows}
    held_out = held or ()
    return DataReport(
        rows=rows,
        shown=tuple(_shown(row, tokenizer) for row in rows.rows[:first]),
        shapes=feed.shapes,
        waste=feed.waste,
        per_epoch=feed.per_epoch,
        packed=feed.config.pack,
        held=len(held_out),
        held_shared=sum(row.digest in trained for row in held_out),
    )


def _shown(row: Row, tokenizer: Any) -> ShownRow:
    cut = ""
    if row.beyond is not None:
        cut = "".join(_pieces(row.beyond.tolist(), tokenizer))
    return ShownRow(row, tuple(pieces(row, tokenizer)), cut)
