"""HTML that every static view is made of: tables, lists, and what scrolls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def scrollable(table: str) -> str:
    """Return a table that scrolls within itself, so that a narrow page keeps its width."""
    return f"<div style='overflow-x:auto'>{table}</div>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a scrollable table of plain text.

    Args:
        head: names of the columns; escaped.
        rows: cells by row; escaped.
    """
    body = "".join(_row("td", row) for row in rows)
    return scrollable(f"<table><thead>{_row('th', head)}</thead><tbody>{body}</tbody></table>")


def _row(tag: str, cells: Sequence[str]) -> str:
    inner = "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells)
    return f"<tr>{inner}</tr>"


def bullets(lines: Sequence[str]) -> str:
    """Return a list of lines of plain text, escaped; nothing where there are none."""
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>"
