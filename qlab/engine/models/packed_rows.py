"""Several rows in one, none seeing another.

A mask that is handed to a model's own forward pass as if it were a cache.

No model is patched, so whether a model honours the mask is tried out on the model itself. Knows no
data.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from qlab.errors import UnsupportedError

_TAIL = 4  # positions at the end that are compared
_SHARE = {mx.float32: 1e-3}  # by which logits may differ; 16-bit activations round more
_COARSE = 0.05


class NoCache:
    """A cache, as the models of mlx-lm know it, that keeps nothing."""

    offset = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return what it is given."""
        return keys, values


NO_CACHE = NoCache()


class PackedRowsCache(NoCache):
    """A cache whose mask lets a position see the earlier ones of its own row only.

    Positions are counted through the packed row: rotary embeddings know only differences.

    Args:
        segments: ``(batch, length)`` integers, one number for each packed row; padding sees
            padding.
    """

    def __init__(self, segments: mx.array) -> None:
        self._segments = segments

    def make_mask(
        self, n: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        """Return ``(batch, 1, length, length)``, true where a position is seen."""
        own = self._segments
        at = mx.arange(n)
        mask = (own[:, None, :, None] == own[:, None, None, :]) & (at[:, None] >= at)
        return mask & (at[:, None] < at + window_size) if window_size else mask


def takes_batches(logits: Callable[[mx.array, mx.array | None], mx.array], length: int) -> bool:
    """Whether a model keeps packed rows apart in a batch of several.

    If not, it does so one row at a time.

    Args:
        logits: of tokens and their segments, ``(batch, length)``; the last positions at least.
        length: of a packed row.

    Raises:
        UnsupportedError: the model mixes packed rows, or minds where in the packed row it stands.
    """
    length = max(length, 3 * _TAIL)
    tokens = (mx.arange(2 * length).reshape(2, length) * 7 + 3) % 61
    cuts = (length - _TAIL - 3, length - _TAIL - 1)  # other ones in each row
    segments = mx.stack([1 + (mx.arange(length) >= cut) for cut in cuts]).astype(mx.int32)
    try:
        alone = [logits(tokens[i : i + 1, cut:], None)[:, -_TAIL:] for i, cut in enumerate(cuts)]
        if _same(lambda: logits(tokens, segments)[:, -_TAIL:], mx.concatenate(alone)):
            return True
        if all(
            _same(lambda i=i: logits(tokens[i : i + 1], segments[i : i + 1])[:, -_TAIL:], alone[i])
            for i in (0, 1)
        ):
            return False
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        raise UnsupportedError(
            f"This model cannot keep packed rows apart; use pack=False. ({error})"
        ) from None
    raise UnsupportedError("This model does not keep packed rows apart; use pack=False.")


def _same(found: Callable[[], mx.array], expected: mx.array) -> bool:
    try:
        made = found()
        mx.eval(made, expected)
    except (ValueError, RuntimeError):  # the mask has no place for rows of a batch
        return False
    far = mx.linalg.norm((made - expected).astype(mx.float32)) / mx.linalg.norm(
        expected.astype(mx.float32)
    )
    return far.item() < _SHARE.get(expected.dtype, _COARSE)
