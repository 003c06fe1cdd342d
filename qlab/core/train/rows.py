"""Rows to train on, as values: tokens, which of them are targets, and batches of them.

Knows no tokenizer and no framework.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from math import isfinite

import numpy as np
from numpy.typing import ArrayLike

from qlab.errors import DataError


def foreign(tokens: ArrayLike, vocabulary: int | None) -> str:
    """Say which token a model does not know: MLX would look it up in foreign memory.

    Empty if it knows all.

    Args:
        tokens: integers ``(T,)``.
        vocabulary: tokens that the model knows; None is not checked.
    """
    if vocabulary is None:
        return ""
    found = np.asarray(tokens)
    wrong = found[(found < 0) | (found >= vocabulary)]
    words = (
        f"is none of the model's, 0 to {vocabulary - 1}; the tokenizer knows more than the model"
    )
    return f"token {wrong[0]} {words}" if wrong.size else ""


@dataclass(frozen=True, eq=False)
class Row:
    """One training row, as the model will see it.

    Attributes:
        number: index in the user's data.
        tokens: int32 ``(T,)``.
        mask: uint8 ``(T,)``, 1 where the token is a target; the first never is.
        cut: tokens cut off at the end.
        beyond: the first tokens of those cut off, int32, for the eye.
    """

    number: int
    tokens: np.ndarray
    mask: np.ndarray
    cut: int = 0
    beyond: np.ndarray | None = None

    @cached_property
    def digest(self) -> bytes:
        """Hash of tokens and mask: equal for rows that teach the same."""
        return sha256(self.tokens.tobytes() + b"|" + self.mask.tobytes()).digest()


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
        return sum(int(row.mask.sum()) for row in self.rows)

    @cached_property
    def cut(self) -> int:
        """Rows that lost tokens at their end."""
        return sum(row.cut > 0 for row in self.rows)

    @cached_property
    def duplicates(self) -> int:
        """Rows that repeat an earlier one, token by token."""
        return len(self.rows) - len({row.digest for row in self.rows})

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all tokens and masks, in order: hex digits of SHA-256."""
        return sha256(b"".join(row.digest for row in self.rows)).hexdigest()

    def split(self, held: int | float, seed: int) -> tuple[Rows, Rows]:
        """Return rows to train on and rows held out.

        Equal rows stay on one side, so that none is judged that was learned.

        Args:
            held: rows to hold out: a number, or a share below 1. It is missed by a few where
                duplicates leave no choice, and none is held out where all rows are equal.
            seed: of the choice.

        Raises:
            DataError: fewer than one row would be held out, or no row left to train on.
        """
        share = held if isinstance(held, float) and isfinite(held) else 0.0
        count = round(share * len(self)) if isinstance(held, float) else held
        if isinstance(held, bool) or not 1 <= count < len(self):
            raise DataError(
                f"{held!r} of {len(self)} rows cannot be held out; hold out 1 to {len(self) - 1}, or a share of them."
            )
        groups: dict[bytes, list[int]] = {}
        for i, row in enumerate(self.rows):
            groups.setdefault(row.digest, []).append(i)
        drawn = [list(groups.values())[k] for k in order(len(groups), seed, 1)]
        taken: set[int] = set()
        for group in drawn:
            if len(taken) + len(group) <= count:
                taken.update(group)
        if not taken and len(drawn) > 1:
            taken.update(min(drawn, key=len))
        sides = [
            tuple(row for i, row in enumerate(self.rows) if (i in taken) == side)
            for side in (False, True)
        ]
        return replace(self, rows=sides[0]), replace(self, rows=sides[1], dropped=())

    def __repr__(self) -> str:
        text = f"Rows({len(self)} {self.kind}, {self.tokens} tokens, {self.targets} targets"
        found = ((self.duplicates, "duplicates"), (self.cut, "cut"), (len(self.dropped), "dropped"))
        return text + "".join(f", {count} {what}" for count, what in found if count) + ")"


def order(count: int, *seed: int) -> np.ndarray:
    """Return the numbers 0 … count−1 in an order drawn from a seed, int64.

    Made from the raw words of the generator, which numpy promises not to change, so that a run
    resumed after an upgrade sees the same rows.
    """
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows that pass the model at once.

    Attributes:
        tokens: int32 ``(B, L)``, padded with 0.
        mask: uint8 ``(B, L)``, 1 where a token is a target: never padding, never the first token of
            a row.
        segments: int32 ``(B, L)`` where rows are packed: 1, 2, … for the rows in a row, 0 for
            padding; else None.
        numbers: which of the user's rows are in each row.
        real: tokens without padding.
    """

    tokens: np.ndarray
    mask: np.ndarray
    segments: np.ndarray | None
    numbers: tuple[tuple[int, ...], ...]
    real: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and length."""
        return self.tokens.shape[0], self.tokens.shape[1]

    @cached_property
    def targets(self) -> int:
        """Number of targets; 1 at least."""
        return int(self.mask.sum())
