"""``DataReport``: what of the rows is trained, masked, cut and dropped; and the same in plain text.

``engine/data/preview`` makes it, ``Trainer.data`` returns it, and ``views/cards/data`` draws it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from qlab.core.arithmetic import ceil_div
from qlab.core.display import Displayed
from qlab.core.train.rows import Row, Rows
from qlab.deprecated import deprecated_name

SHOWN_TOKENS = 320  # of a row
_BINS = 10
_REASONS = 6
_NUMBERS = 12  # of dropped rows named for each reason
_SHAPES = 3  # listed one by one


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

    @property
    def title(self) -> str:
        """Number, length and targets, in words."""
        row = self.row
        cut = f", {row.cut:,} more cut off" if row.cut else ""
        targets = int(row.mask.sum())
        return f"row {row.number}: {row.tokens.size:,} tokens, {targets:,} targets{cut}"

    @property
    def rest(self) -> str:
        """How many tokens are not shown, in words."""
        left = len(self.pieces) - SHOWN_TOKENS
        return f" … {left:,} more tokens" if left > 0 else ""


@dataclass(frozen=True, eq=False, kw_only=True)
class DataReport(Displayed):
    """What will be trained on, for a person to check before the first step.

    Example:
        >>> report = trainer.data
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

    @property
    def report(self) -> DataReport:
        """Itself, as an older ``Trainer.data`` had it; deprecated."""
        deprecated_name("Trainer.data.report", "Trainer.data")
        return self

    def __repr__(self) -> str:
        return text(self)


def text(report: DataReport) -> str:
    """Return the report in plain text: targets stand between ⟦ and ⟧."""
    lines = [headline(report), batches(report)]
    lines += [f"dropped {line}" for line in dropped(report)]
    for shown in report.shown:
        lines += ["", shown.title, _marked(shown)]
    return "\n".join(lines)


def _marked(shown: ShownRow) -> str:
    mask = shown.row.mask[:SHOWN_TOKENS].tolist()
    pairs = zip(mask, shown.pieces[:SHOWN_TOKENS], strict=True)
    parts = []
    for is_target, run in groupby(pairs, lambda pair: bool(pair[0])):
        piece = "".join(piece for _, piece in run)
        parts.append(f"⟦{piece}⟧" if is_target else piece)
    cut = f" ✂ {shown.beyond}…" if shown.row.cut else ""
    return f"{''.join(parts)}{shown.rest}{cut}"


def headline(report: DataReport) -> str:
    """Return one line of numbers."""
    rows = report.rows
    share = 100 * rows.targets / max(rows.tokens, 1)
    parts = [
        f"{len(rows):,} {rows.kind} rows",
        f"{rows.tokens:,} tokens",
        f"{rows.targets:,} targets ({share:.0f} %)",
    ]
    losses = {
        "repeat another": rows.duplicates,
        "cut at the end": rows.cut,
        "dropped": len(rows.dropped),
    }
    parts += [f"{count:,} {what}" for what, count in losses.items() if count]
    if report.held:
        shared = ""
        if report.held_shared:
            shared = f", of which {report.held_shared:,} are also trained on"
        parts.append(f"{report.held:,} held out{shared}")
    return " · ".join(parts)


def batches(report: DataReport) -> str:
    """Return a line about batches."""
    shapes = [f"{rows} × {length}" for rows, length in report.shapes]
    kinds = f"of {', '.join(shapes)} tokens"
    if len(shapes) > _SHAPES:
        kinds = f"of {len(shapes)} shapes up to {shapes[0]} tokens"
    filled = "packed" if report.packed else "padded"
    noun = "batches" if report.per_epoch > 1 else "batch"
    waste = f"{report.waste:.2f} tokens computed per real one"
    return f"{report.per_epoch:,} {filled} {noun} an epoch {kinds}; {waste}"


def dropped(report: DataReport) -> list[str]:
    """Return a line for each reason for which rows were dropped, with their numbers."""
    lines = []
    reasons = Counter(reason for _, reason in report.rows.dropped).most_common()
    for reason, count in reasons[:_REASONS]:
        numbers = [str(number) for number, why in report.rows.dropped if why == reason]
        listed = ", ".join(numbers[:_NUMBERS])
        more = ", …" if count > _NUMBERS else ""
        lines.append(f"{count:,}: {reason} (row {listed}{more})")
    others = sum(count for _, count in reasons[_REASONS:])
    if others:
        lines.append(f"{others:,} for other reasons")
    return lines


def histogram(report: DataReport) -> list[tuple[str, int]]:
    """Return ranges of length, such as ``33–48``, and how many rows are in each."""
    lengths = report.rows.lengths
    low = int(lengths.min())
    high = int(lengths.max())
    step = ceil_div(high - low + 1, _BINS)
    counts = np.bincount((lengths - low) // step)
    ranges = []
    for i, count in enumerate(counts):
        first = low + i * step
        last = min(first + step - 1, high)
        name = str(first) if first == last else f"{first}–{last}"
        ranges.append((name, int(count)))
    return ranges
