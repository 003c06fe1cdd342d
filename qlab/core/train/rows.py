"""Rows to train on, as values: tokens, which of them are targets, and batches of them.

``engine/data`` makes them from a user's data; the training loop reads them. numpy only.
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


def outside_vocabulary(tokens: ArrayLike, vocabulary: int | None) -> str:
    """Say which token is outside a model's vocabulary; an empty string if none is.

    MLX does not check it: it would look such a token up in whatever memory lies behind the
    embedding.

    Args:
        tokens: integers ``(T,)``.
        vocabulary: tokens that the model knows; None is not checked.
    """
    if vocabulary is None:
        return ""
    numbers = np.asarray(tokens)
    outside = numbers[(numbers < 0) | (numbers >= vocabulary)]
    if not outside.size:
        return ""
    return (
        f"token {outside[0]} is outside the model's vocabulary (0–{vocabulary - 1}); "
        "the tokenizer knows more tokens than the model"
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class Row:
    """One training row, as the model will see it.

    Attributes:
        number: index in the user's data.
        tokens: int32 ``(T,)``.
        mask: uint8 ``(T,)``, 1 where the token is a target; the first never is.
        cut: tokens cut off at the end.
        beyond: the first tokens of those cut off, int32, to be shown; None if none were cut.
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
    """Rows that can be trained on, and which rows of the data were left out.

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

        Equal rows stay on one side, so that no row is validated on that was trained on.

        Args:
            held: rows to hold out: a number, or a share below 1. It is missed by a few where
                duplicates leave no choice, and none is held out where all rows are equal.
            seed: of the choice.

        Returns:
            Rows to train on, and rows held out; both in the user's order.

        Raises:
            DataError: fewer than one row would be held out, or no row left to train on.
        """
        held_out = self._draw(self._count_of(held), seed)
        trained = tuple(row for i, row in enumerate(self.rows) if i not in held_out)
        validation = tuple(row for i, row in enumerate(self.rows) if i in held_out)
        return replace(self, rows=trained), replace(self, rows=validation, dropped=())

    def _count_of(self, held: int | float) -> int:
        """Number of rows for a number or a share."""
        count = held
        if isinstance(held, float):
            share = held if isfinite(held) else 0.0
            count = round(share * len(self))
        if isinstance(held, bool) or not 1 <= count < len(self):
            legal = f"hold out 1 to {len(self) - 1}, or a share of them"
            raise DataError(f"{held!r} of {len(self)} rows cannot be held out; {legal}.")
        return int(count)

    def _draw(self, count: int, seed: int) -> set[int]:
        """Draw about ``count`` rows, equal ones together; return their places."""
        equal: dict[bytes, list[int]] = {}
        for i, row in enumerate(self.rows):
            equal.setdefault(row.digest, []).append(i)
        groups = list(equal.values())
        shuffled = [groups[k] for k in order(len(groups), seed, 1)]
        drawn: set[int] = set()
        for group in shuffled:
            if len(drawn) + len(group) <= count:
                drawn.update(group)
        if not drawn and len(groups) > 1:  # all groups are larger than what was asked for
            drawn.update(min(shuffled, key=len))
        return drawn

    def __repr__(self) -> str:
        parts = [f"{len(self)} {self.kind}", f"{self.tokens} tokens", f"{self.targets} targets"]
        losses = {"duplicates": self.duplicates, "cut": self.cut, "dropped": len(self.dropped)}
        parts += [f"{count} {what}" for what, count in losses.items() if count]
        return f"Rows({', '.join(parts)})"


def order(count: int, *seed: int) -> np.ndarray:
    """Return the numbers 0 … count−1 in an order drawn from a seed, int64.

    Made from the raw words of the generator, which numpy promises not to change, so that a run
    resumed after an upgrade sees the same rows.
    """
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")


@dataclass(frozen=True, eq=False, kw_only=True)
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
        """Number of targets."""
        return int(self.mask.sum())
