"""Tables that may be wider than the page. Knows not what is in them."""

from __future__ import annotations


def wide(table: str) -> str:
    """Return an html table that scrolls within itself where the page is narrower, so that the page
    stays as it is.
    """
    return f"<div style='overflow-x:auto'>{table}</div>"


def size_text(nbytes: float) -> str:
    """Write a size with its unit; GB = 1e9 bytes."""
    return f"{nbytes / 1e9:.2f} GB" if abs(nbytes) >= 1e9 else f"{nbytes / 1e6:.1f} MB"
