"""``DataReport``: what of the rows is trained, masked, cut and dropped.

``engine/data/preview`` makes it, and ``views/cards/data`` draws it.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlab.core.train.rows import Row, Rows


@dataclass(frozen=True, eq=False)
class ShownRow:
    """A row as a person reads it.

    Attributes:
        row: the row.
        pieces: text of each token; joined, they are the text.
        beyond: text of the first tokens that were cut off.
    """

    row: Row
    pieces: tuple[str, ...]
    beyond: str = ""


@dataclass(frozen=True, eq=False, kw_only=True)
class DataReport:
    """What will be trained on, for a person to check before the first step.

    Example:
        >>> report = trainer.data.report
        >>> report.rows.targets, report.per_epoch

    Attributes:
        rows: all rows.
        shown: the first few, to read.
        shapes: distinct ``(rows, length)`` of batches, the largest first.
        waste: tokens computed per real token; 1.0 means that there is no padding.
        per_epoch: batches in a pass through the rows.
        packed: whether several rows share one row of a batch.
        held: rows held out.
        held_shared: rows held out that are also trained on; 0 unless both were given.
    """

    rows: Rows
    shown: tuple[ShownRow, ...]
    shapes: tuple[tuple[int, int], ...]
    waste: float
    per_epoch: int
    packed: bool
    held: int = 0
    held_shared: int = 0
