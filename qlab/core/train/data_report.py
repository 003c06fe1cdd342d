"""``DataReport``: what of the rows is trained, masked, cut and dropped."""

from __future__ import annotations

from dataclasses import dataclass

from qlab.core.train.rows import Row, Rows


@dataclass(frozen=True, eq=False)
class Shown:
    """A row as a person reads it.

    Attributes:
        row: the row.
        pieces: text of each token; joined, they are the text.
        beyond: text of the first tokens that were cut off.
    """

    row: Row
    pieces: tuple[str, ...]
    beyond: str = ""


@dataclass(frozen=True, eq=False)
class DataReport:
    """What will be trained on, for a person to check before the first step.

    Attributes:
        rows: all rows.
        shown: the first few, to read.
        shapes: distinct ``(rows, length)`` of batches.
        waste: tokens computed per real token.
        per_epoch: batches in a pass through the rows.
        packed: whether several rows share one.
        held: rows held out.
        held_shared: rows held out that are also trained on; 0 unless both were given.
    """

    rows: Rows
    shown: tuple[Shown, ...]
    shapes: tuple[tuple[int, int], ...]
    waste: float
    per_epoch: int
    packed: bool
    held: int = 0
    held_shared: int = 0
