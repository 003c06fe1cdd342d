"""Rows to train on, as values: tokens, and which of them are targets. Knows no tokenizer and no framework."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256

import numpy as np


@dataclass(frozen=True, eq=False)
class Row:
    """One training row, as the model will see it.

    Attributes:
        number: index in the user's data.
        tokens: int32 ``(T,)``.
        mask: uint8 ``(T,)``, 1 where the token is a target; the first never is.
        cut: tokens cut off at the end.
    """

    number: int
    tokens: np.ndarray
    mask: np.ndarray
    cut: int = 0


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows that can be trained on, and what was found on the way.

    Attributes:
        rows: in the user's order.
        kind: ``text``, ``completion``, ``chat`` or ``mixed``.
        dropped: ``(number, reason)`` of rows that have nothing to train on.
    """

    rows: tuple[Row, ...]
    kind: str = "text"
    dropped: tuple[tuple[int, str], ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 ``(rows,)``."""
        return np.array([row.tokens.size for row in self.rows], np.int64)

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return int(self.lengths.sum())

    @cached_property
    def targets(self) -> int:
        """Targets of all rows."""
        return int(sum(int(row.mask.sum()) for row in self.rows))

    @cached_property
    def duplicates(self) -> int:
        """Rows that repeat an earlier one, token by token."""
        return len(self.rows) - len(Counter(map(_print, self.rows)))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all tokens and masks, in order."""
        digest = sha256()
        for row in self.rows:
            digest.update(_print(row))
        return digest.hexdigest()

    def split(self, count: int, seed: int) -> tuple[Rows, Rows]:
        """Return rows to train on and about so many held out; equal rows stay on one side.

        Args:
            count: rows to hold out.
            seed: of the choice.
        """
        groups: dict[bytes, list[int]] = {}
        for i, row in enumerate(self.rows):
            groups.setdefault(_print(row), []).append(i)
        held: set[int] = set()
        keys = list(groups)
        for k in np.random.default_rng((seed, 1)).permutation(len(keys)):
            if len(held) >= count:
                break
            if len(held) + len(groups[keys[k]]) < len(self.rows):
                held.update(groups[keys[k]])
        parts = [tuple(row for i, row in enumerate(self.rows) if (i in held) == side) for side in (False, True)]
        return replace(self, rows=parts[0]), replace(self, rows=parts[1], dropped=())

    def __repr__(self) -> str:
        text = f"Rows({len(self)} {self.kind}, {self.tokens} tokens, {self.targets} targets"
        text += f", {self.duplicates} duplicates" if self.duplicates else ""
        return text + (f", {len(self.dropped)} dropped)" if self.dropped else ")")


def _print(row: Row) -> bytes:
    return sha256(row.tokens.tobytes() + b"|" + row.mask.tobytes()).digest()


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows that pass the model at once.

    Attributes:
        tokens: int32 ``(B, L)``, padded.
        mask: uint8 ``(B, L)``, 1 where a token is a target: never padding, never the first token of a row.
        segments: int32 ``(B, L)`` where rows are packed: 1, 2, … for the rows in a row, 0 for padding; else None.
        numbers: which of the user's rows are in each row.
        real: tokens without padding.
    """

    tokens: np.ndarray
    mask: np.ndarray
    segments: np.ndarray | None
    numbers: tuple[tuple[int, ...], ...]
    real: int

    @property
    def targets(self) -> int:
        """Number of targets."""
        return int(self.mask.sum())
