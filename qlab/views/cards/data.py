"""Draws what will be trained on: which tokens are targets, how long rows are, what was dropped.

Sees a report, no tokenizer.
"""

from __future__ import annotations

import html as _html
from collections import Counter
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from qlab.core.arithmetic import ceil_div
from qlab.core.train.data_report import DataReport, ShownRow
from qlab.views.shared.markup import scrollable

_TOKENS = 320  # of a row that are shown
_BINS = 10
_REASONS = 6
_NUMBERS = 12  # of dropped rows named for each reason
# seen on light and dark ground; the tags alone tell targets (underlined) and cuts (struck out)
# where styles are removed
_TARGET = (
    "background-color:#4c78a866",
    "background-color:#4c78a82b",
)  # neighbours differ, so that tokens can be counted
_MASKED = "opacity:0.62"
_CUT = "background-color:#e4575633;opacity:0.8"
_FLOW = (
    "white-space:pre-wrap;overflow-wrap:anywhere;font-family:monospace;line-height:1.7;padding:4px 8px;max-width:900px;"
    "text-align:left"
)
_CELL = "text-align:left;padding:2px 10px 2px 0"


@dataclass(frozen=True)
class DataView:
    """What will be trained on, as a cell shows it.

    Attributes:
        report: the figures, and the rows to read.
    """

    report: DataReport

    def __repr__(self) -> str:
        return text(self.report)

    def _repr_html_(self) -> str:
        return html(self.report)


def headline(report: DataReport) -> str:
    """Return one line of numbers."""
    rows = report.rows
    share = 100 * rows.targets / max(rows.tokens, 1)
    parts = [
        f"{len(rows):,} {rows.kind} rows",
        f"{rows.tokens:,} tokens",
        f"{rows.targets:,} targets ({share:.0f} %)",
    ]
    for count, what in (
        (rows.duplicates, "repeat another"),
        (rows.cut, "cut at the end"),
        (len(rows.dropped), "dropped"),
    ):
        parts += [f"{count:,} {what}"] if count else []
    if report.held:
        shared = (
            f", of which {report.held_shared:,} are also trained on" if report.held_shared else ""
        )
        parts.append(f"{report.held:,} held out{shared}")
    return " · ".join(parts)


def batches(report: DataReport) -> str:
    """Return a line about batches."""
    shapes = [f"{rows} × {length}" for rows, length in report.shapes]
    few = (
        f"of {', '.join(shapes)} tokens"
        if len(shapes) < 4
        else f"of {len(shapes)} shapes up to {shapes[0]} tokens"
    )
    kind = f"{'packed' if report.packed else 'padded'} batch{'es' if report.per_epoch > 1 else ''}"
    return f"{report.per_epoch:,} {kind} an epoch {few}; {report.waste:.2f} tokens computed per real one"


def dropped(report: DataReport) -> list[str]:
    """Return a line for each reason for which rows were dropped, with their numbers."""
    lines = []
    reasons = Counter(reason for _, reason in report.rows.dropped)
    for reason, count in reasons.most_common(_REASONS):
        numbers = [str(n) for n, why in report.rows.dropped if why == reason][:_NUMBERS]
        lines.append(
            f"{count:,}: {reason} (row {', '.join(numbers)}{', …' if count > len(numbers) else ''})"
        )
    left = len(report.rows.dropped) - sum(count for _, count in reasons.most_common(_REASONS))
    return [*lines, f"{left:,} for other reasons"] if left else lines


def histogram(report: DataReport) -> list[tuple[str, int]]:
    """Return ranges of length, such as ``33–48``, and how many rows are in each."""
    lengths = report.rows.lengths
    low = int(lengths.min())
    high = int(lengths.max())
    step = max(ceil_div(high - low + 1, _BINS), 1)
    counts = np.bincount((lengths - low) // step)
    spans = [(low + i * step, min(low + (i + 1) * step - 1, high)) for i in range(len(counts))]
    return [
        (str(a) if a == b else f"{a}–{b}", int(count))
        for (a, b), count in zip(spans, counts, strict=True)
    ]


# --- text -----------------------------------------------------------------------------------------


def text(report: DataReport) -> str:
    """Return the same in plain text: targets stand between ⟦ and ⟧."""
    lines = [headline(report), batches(report)]
    lines += [f"dropped {line}" for line in dropped(report)]
    for shown in report.shown:
        lines += [
            "",
            _title(shown),
            "".join(f"⟦{part}⟧" if target else part for target, part in _runs(shown))
            + _rest(shown),
        ]
        if shown.row.cut:
            lines[-1] += f" ✂ {shown.beyond}…"
    return "\n".join(lines)


def _title(shown: ShownRow) -> str:
    row = shown.row
    cut = f", {row.cut:,} more cut off" if row.cut else ""
    return f"row {row.number}: {row.tokens.size:,} tokens, {int(row.mask.sum()):,} targets{cut}"


def _runs(shown: ShownRow) -> list[tuple[bool, str]]:
    pairs = zip(shown.row.mask[:_TOKENS].tolist(), shown.pieces[:_TOKENS], strict=True)
    return [
        (bool(target), "".join(piece for _, piece in run))
        for target, run in groupby(pairs, lambda pair: pair[0])
    ]


def _rest(shown: ShownRow) -> str:
    left = len(shown.pieces) - _TOKENS
    return f" … {left:,} more tokens" if left > 0 else ""


# --- html -----------------------------------------------------------------------------------------


def html(report: DataReport) -> str:
    """Return tables and styled text, which untrusted notebooks and code hosts show too."""
    lost = "".join(f"<li>{_html.escape(line)}</li>" for line in dropped(report))
    if lost:
        count = len(report.rows.dropped)
        lost = f"<details open><summary>{count:,} row{'s' * (count > 1)} dropped</summary><ul>{lost}</ul></details>"
    rows = "".join(_row(shown, opened=n < 2) for n, shown in enumerate(report.shown))
    return (
        f"<div><p><b>{_html.escape(headline(report))}</b><br>{_html.escape(batches(report))}</p>"
        f"<p><ins style='{_TARGET[0]}'>trained: a target</ins> &nbsp; <span style='{_MASKED}'>masked: read, not learned</span>"
        f" &nbsp; <del style='{_CUT}'>cut off</del></p>{rows}{_more(report)}"
        f"<details><summary>lengths in tokens</summary>{_bars(histogram(report))}</details>"
        f"{lost}</div>"
    )


def _more(report: DataReport) -> str:
    left = len(report.rows) - len(report.shown)
    return f"<p>… and {left:,} more rows.</p>" if left > 0 else ""


def _row(shown: ShownRow, opened: bool) -> str:
    parts = []
    n = 0
    for target, run in groupby(
        range(min(len(shown.pieces), _TOKENS)), lambda k: bool(shown.row.mask[k])
    ):
        pieces = [_visible(shown.pieces[k]) for k in run]
        if not target:
            parts.append(f"<span style='{_MASKED}'>{''.join(pieces)}</span>")
            continue
        for piece in pieces:
            parts.append(f"<ins style='{_TARGET[n % 2]}'>{piece}</ins>")
            n += bool(piece)
    parts.append(_html.escape(_rest(shown)))
    if shown.row.cut:
        parts.append(f"<del style='{_CUT}'>{_visible(shown.beyond)}…</del>")
    return (
        f"<details{' open' if opened else ''}><summary>{_html.escape(_title(shown))}</summary>"
        f"<div style='{_FLOW}'>{''.join(parts)}</div></details>"
    )


def _visible(piece: str) -> str:
    """Escape a token, and show a line break as one that is a token."""
    return _html.escape(piece).replace("\n", "↵\n")


def _bars(counts: list[tuple[str, int]]) -> str:
    top = max(count for _, count in counts)
    cells = "".join(
        f"<tr><td style='{_CELL}'>{span}</td><td style='{_CELL}'>{count:,}</td><td style='{_CELL}'>"
        f"<div style='background-color:#4c78a8;height:10px;width:{round(260 * count / top)}px'></div></td></tr>"
        for span, count in counts
    )
    return scrollable(
        f"<table><thead><tr><th>tokens</th><th>rows</th><th></th></tr></thead><tbody>{cells}</tbody></table>"
    )
