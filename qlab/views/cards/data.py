"""What will be trained on, as tables and styled text: targets, lengths of rows, what was dropped.

Registers the view of ``DataReport``; sees the report, never a tokenizer.
"""

from __future__ import annotations

from html import escape
from itertools import groupby

from qlab.core.display import view_of
from qlab.core.train.data_report import (
    SHOWN_TOKENS,
    DataReport,
    ShownRow,
    batches,
    dropped,
    headline,
    histogram,
)
from qlab.views.shared.markup import bullets, scrollable

_OPEN_ROWS = 2  # the others are folded
_BAR = 260  # pixels
# Seen on light and dark ground. The tags alone tell targets (underlined) and cuts (struck out)
# where styles are removed. Neighbouring targets differ, so that tokens can be counted.
_TARGET = ("background-color:#4c78a866", "background-color:#4c78a82b")
_MASKED = "opacity:0.62"
_CUT = "background-color:#e4575633;opacity:0.8"
_FLOW = (
    "white-space:pre-wrap;overflow-wrap:anywhere;font-family:monospace;line-height:1.7;"
    "padding:4px 8px;max-width:900px;text-align:left"
)
_CELL = "text-align:left;padding:2px 10px 2px 0"
_LEGEND = (
    f"<ins style='{_TARGET[0]}'>trained: a target</ins> &nbsp; "
    f"<span style='{_MASKED}'>masked: read, not learned</span> &nbsp; "
    f"<del style='{_CUT}'>cut off</del>"
)


@view_of(DataReport)
def html(report: DataReport) -> str:
    """Return tables and styled text, which untrusted notebooks and code hosts show too."""
    title = f"<p><b>{escape(headline(report))}</b><br>{escape(batches(report))}</p>"
    rows = [_row(shown, n < _OPEN_ROWS) for n, shown in enumerate(report.shown)]
    lengths = _bars(histogram(report))
    parts = [
        title,
        f"<p>{_LEGEND}</p>",
        *rows,
        _more(report),
        f"<details><summary>lengths in tokens</summary>{lengths}</details>",
        _dropped(report),
    ]
    return f"<div>{''.join(parts)}</div>"


def _dropped(report: DataReport) -> str:
    count = len(report.rows.dropped)
    if not count:
        return ""
    noun = "rows" if count > 1 else "row"
    reasons = bullets(dropped(report))
    return f"<details open><summary>{count:,} {noun} dropped</summary>{reasons}</details>"


def _more(report: DataReport) -> str:
    left = len(report.rows) - len(report.shown)
    return f"<p>… and {left:,} more rows.</p>" if left > 0 else ""


def _row(shown: ShownRow, is_open: bool) -> str:
    attribute = " open" if is_open else ""
    text = f"{_tokens(shown)}{escape(shown.rest)}"
    if shown.row.cut:
        text += f"<del style='{_CUT}'>{_visible(shown.beyond)}…</del>"
    return (
        f"<details{attribute}><summary>{escape(shown.title)}</summary>"
        f"<div style='{_FLOW}'>{text}</div></details>"
    )


def _tokens(shown: ShownRow) -> str:
    """Masked tokens in one span a run, targets each in a tag of its own."""
    parts = []
    targets = 0
    numbers = range(min(len(shown.pieces), SHOWN_TOKENS))
    for is_target, run in groupby(numbers, lambda k: bool(shown.row.mask[k])):
        pieces = [_visible(shown.pieces[k]) for k in run]
        if not is_target:
            parts.append(f"<span style='{_MASKED}'>{''.join(pieces)}</span>")
            continue
        for piece in pieces:
            parts.append(f"<ins style='{_TARGET[targets % 2]}'>{piece}</ins>")
            targets += bool(piece)  # half of a character is empty, and takes no shade
    return "".join(parts)


def _visible(piece: str) -> str:
    """Escape a token, and show a line break as one that is a token."""
    return escape(piece).replace("\n", "↵\n")


def _bars(counts: list[tuple[str, int]]) -> str:
    most = max(count for _, count in counts)
    rows = "".join(_bar(name, count, round(_BAR * count / most)) for name, count in counts)
    head = "<tr><th>tokens</th><th>rows</th><th></th></tr>"
    return scrollable(f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>")


def _bar(name: str, count: int, pixels: int) -> str:
    bar = f"<div style='background-color:#4c78a8;height:10px;width:{pixels}px'></div>"
    cells = [name, f"{count:,}", bar]
    return "<tr>" + "".join(f"<td style='{_CELL}'>{cell}</td>" for cell in cells) + "</tr>"
