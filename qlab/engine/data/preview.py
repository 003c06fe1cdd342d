"""Rows as the pieces of text that are trained, masked and cut; for the preview."""

from __future__ import annotations

from typing import Any

from qlab.core.train.data_report import DataReport, Shown
from qlab.core.train.rows import Row, Rows
from qlab.engine.data.batches import Feed

# --- for the eye ----------------------------------------------------------------------------------


def pieces(row: Row, tokenizer: Any) -> list[str]:
    """Return the text of each token; joined, they are the text.

    A character made of several tokens stands with the last.
    """
    return _pieces(row.tokens.tolist(), tokenizer)


def _pieces(tokens: list[int], tokenizer: Any) -> list[str]:
    """Decode in the company of the tokens before, since some tokenizers drop the space that a text
    begins with.
    """
    made = []
    before = 0
    read_to = 0
    for k in range(len(tokens)):
        known = tokenizer.decode(tokens[before:read_to]) if read_to else ""
        text = tokenizer.decode(tokens[before : k + 1])
        if (
            text.endswith("\ufffd") and k - read_to < 4 and k + 1 < len(tokens)
        ):  # half of a character
            made.append("")
            continue
        made.append(text[len(known) :])
        before = read_to
        read_to = k + 1
    return made


def report(feed: Feed, tokenizer: Any, held: Rows | None = None, first: int = 6) -> DataReport:
    """Return what will be trained on, for a person to check before the first step.

    Args:
        feed: of the run.
        tokenizer: mlx-lm's wrapper.
        held: rows held out.
        first: rows to show.
    """
    rows = feed.rows
    shown = tuple(
        Shown(
            row,
            tuple(pieces(row, tokenizer)),
            "" if row.beyond is None else "".join(_pieces(row.beyond.tolist(), tokenizer)),
        )
        for row in rows.rows[:first]
    )
    learned = {row.digest for row in rows}
    shared = sum(row.digest in learned for row in held or ())
    packed = feed.config.pack
    return DataReport(
        rows, shown, feed.shapes, feed.waste, feed.per_epoch, packed, len(held or ()), shared
    )
