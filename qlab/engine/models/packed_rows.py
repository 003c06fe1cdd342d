"""Several packed rows in one row of a batch, none seeing another.

A mask that is handed to a model's own forward pass as if it were a cache: mlx-lm's models ask their
cache for the mask. No model is patched, so whether a model honours the mask is tried out on the
model itself (``takes_batches``).
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from qlab.engine.models.compare import relative_distance
from qlab.errors import UnsupportedError

_TAIL = 4  # positions at the end that are compared
# relative distance by which logits may differ; 16-bit activations round more
_TOLERANCE = {mx.float32: 1e-3}
_TOLERANCE_16_BIT = 0.05

# logits ``(batch, length, vocabulary)`` of tokens and segments, ``(batch, length)`` each
Logits = Callable[[mx.array, "mx.array | None"], mx.array]


class NoCache:
    """A cache, as the models of mlx-lm know it, that caches nothing."""

    offset = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return the keys and values of this call, ``(batch, groups, length, width)`` each."""
        return keys, values


NO_CACHE = NoCache()


class PackedRowsCache(NoCache):
    """A cache whose mask lets a position see the earlier ones of its own packed row only.

    Positions are counted through the whole row: rotary embeddings know only differences.

    Args:
        segments: ``(batch, length)`` integers, one number for each packed row; padding sees
            padding.
    """

    def __init__(self, segments: mx.array) -> None:
        self._segments = segments

    def make_mask(
        self, n: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        """Return the mask of attention, ``(batch, 1, length, length)``: true where one is seen.

        Args:
            n: length.
            return_array: mlx-lm's; an array is returned either way.
            window_size: how many positions back one sees; None means all.
        """
        rows = self._segments
        same_row = rows[:, None, :, None] == rows[:, None, None, :]
        position = mx.arange(n)
        mask = same_row & (position[:, None] >= position)  # (batch, 1, length, length)
        if window_size:
            mask = mask & (position[:, None] < position + window_size)
        return mask


def takes_batches(logits: Logits, length: int) -> bool:
    """Whether a model keeps packed rows apart in a batch of several rows.

    If not, it does so one row at a time.

    Args:
        logits: the model as a function; the last positions' logits at least.
        length: of a packed row.

    Raises:
        UnsupportedError: the model mixes packed rows, or minds where in the row one stands.
    """
    length = max(length, 3 * _TAIL)
    numbers = mx.arange(2 * length).reshape(2, length)
    tokens = (numbers * 7 + 3) % 61
    cuts = (length - _TAIL - 3, length - _TAIL - 1)  # where the second packed row begins
    second = [mx.arange(length) >= cut for cut in cuts]
    segments = 1 + mx.stack(second).astype(mx.int32)  # (2, length)
    rows = (slice(0, 1), slice(1, 2))
    try:
        alone = []
        for row, cut in zip(rows, cuts, strict=True):
            alone.append(logits(tokens[row, cut:], None)[:, -_TAIL:])
        if _same(logits, tokens, segments, mx.concatenate(alone)):
            return True
        one_by_one = (
            _same(logits, tokens[row], segments[row], expected)
            for row, expected in zip(rows, alone, strict=True)
        )
        if all(one_by_one):
            return False
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        raise UnsupportedError(
            f"This model cannot keep packed rows apart; use pack=False. ({error})"
        ) from None
    raise UnsupportedError("This model does not keep packed rows apart; use pack=False.")


def _same(logits: Logits, tokens: mx.array, segments: mx.array, expected: mx.array) -> bool:
    """Whether the last logits of packed rows are those expected, ``(batch, tail, vocabulary)``."""
    try:
        result = logits(tokens, segments)[:, -_TAIL:]
        mx.eval(result, expected)
    except (ValueError, RuntimeError):  # the mask has no place for rows of a batch
        return False
    tolerance = _TOLERANCE.get(expected.dtype, _TOLERANCE_16_BIT)
    return relative_distance(result, expected) < tolerance
