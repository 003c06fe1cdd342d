"""``Progress``: how far a job is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """A running job: what it does, and how far it is. ``done == total`` means finished."""

    what: str
    done: int
    total: int
