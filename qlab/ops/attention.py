"""Attention for training on a CPU, with a gradient that keeps queries, keys and values only.

MLX's CPU computes attention in separate steps, the exponentials one at a time, repeats keys and
values for the heads that share them, and keeps arrays of the length squared for the gradient. Here
the heads that share a group's keys are rows of one product; groups are computed a few at a time,
one piece after the other, so that only one piece's scores exist; and scores are computed again in
the backward pass. Put in the place of mlx-lm's by ``engine/step/patches.py``.

Shapes: queries ``(batch, heads, length, width)``; keys ``(batch, groups, others, width)``; scores
of a piece ``(batch, groups, heads / groups · length, others)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from qlab.ops.attention_tiles import whole_tiles
from qlab.ops.custom_gradient import with_gradient
from qlab.ops.exponential import exp, is_slow
from qlab.runtime.device import backend

_LOWEST = mx.finfo(mx.float32).min
_MOST_PIECES = 8  # they are smaller, so faster, and more of them are more to compile


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any = None,
    scale: float = 1.0,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Do what ``mlx_lm.models.base.scaled_dot_product_attention`` does.

    What is not computed here is left to it, on CUDA in whole tiles.

    Args:
        queries: ``(batch, heads, length, width)``.
        keys: ``(batch, groups, others, width)``, each group serving ``heads / groups`` heads.
        values: ``(batch, groups, others, any)``.
        cache: as the model hands it on.
        scale: of the products of queries and keys.
        mask: ``causal``, or what can be broadcast to ``(batch, heads, length, others)``: true where
            a position is seen, or numbers that are added.
        sinks: mlx-lm's; left to it.

    Returns:
        ``(batch, heads, length, any)``.
    """
    differentiable = [queries, keys, values]
    plain = all(array.ndim == 4 and is_slow(array) for array in differentiable)
    quantized_cache = hasattr(cache, "bits")
    if not plain or not _is_known(mask) or sinks is not None or quantized_cache:
        return _stock(queries, keys, values, cache, scale, mask, sinks)
    groups = keys.shape[1]
    how = _Attention(
        scale=scale,
        served=queries.shape[1] // groups,
        pieces=_pieces(groups),
        hard=_is_hard(mask),
    )
    if not isinstance(mask, mx.array):
        return with_gradient(how.forward, how.backward, differentiable)
    leading = (1,) * (4 - mask.ndim)
    mask = mask.reshape(leading + mask.shape)
    if how.hard:
        return with_gradient(how.forward, how.backward, differentiable, [mask])
    return with_gradient(how.forward, how.backward, [*differentiable, mask])


def _pieces(groups: int) -> int:
    """Return in how many pieces attention is computed: the most that divide the groups."""
    numbers = range(1, _MOST_PIECES + 1)
    return max(n for n in numbers if groups % n == 0)


def _is_hard(mask: mx.array | str | None) -> bool:
    """Whether a mask says what is seen, instead of being added to the scores."""
    if isinstance(mask, mx.array):
        return mask.dtype == mx.bool_
    return mask is not None


def _is_known(mask: mx.array | str | None) -> bool:
    """Whether a mask is of a kind that is computed here."""
    if isinstance(mask, mx.array):
        return mask.dtype in (mx.bool_, mx.float32)
    return mask in (None, "causal")


def _stock(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: Any,
    sinks: mx.array | None,
) -> mx.array:
    """Leave attention to mlx-lm, on CUDA in whole tiles, whose padding is cut off again."""
    from mlx_lm.models.base import scaled_dot_product_attention

    length = queries.shape[2]
    if backend() == "cuda":
        queries, keys, values, mask = whole_tiles(queries, keys, values, mask)
    output = scaled_dot_product_attention(queries, keys, values, cache, scale, mask, sinks)
    return output[:, :, :length]


class _Softmax(NamedTuple):
    """The softmax of a piece's scores, not yet divided by the sums.

    Attributes:
        rows: scaled queries, ``(batch, groups, rows, width)``.
        exponentials: of the scores less their row's maximum, ``(batch, groups, rows, others)``.
        inverse_sums: one over each row's sum of them, ``(batch, groups, rows, 1)``.
        sees: ``(batch, groups, rows, 1)``, whether a row sees anything; None if all do.
    """

    rows: mx.array
    exponentials: mx.array
    inverse_sums: mx.array
    sees: mx.array | None


@dataclass(frozen=True)
class _Attention:
    """How attention is computed.

    Attributes:
        scale: of the scores.
        served: heads that a group serves.
        pieces: in how many it is computed, some groups each.
        hard: whether a mask says what is seen, instead of being added to the scores; if so and no
            mask is given, it is the causal one.
    """

    scale: float
    served: int
    pieces: int
    hard: bool

    def forward(
        self, q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None = None
    ) -> mx.array:
        """Return the output, ``(batch, heads, length, any)``."""
        outputs: list[mx.array] = []
        for (q_, k_, v_), added in self._cut(self._full_mask(mask, q, k), q, k, v):
            (k_,) = mx.depends([k_], outputs[-1:])  # one piece after the other
            softmax = self._softmax(q_, k_, added)
            output = softmax.exponentials @ v_
            output = output * softmax.inverse_sums  # (batch, groups, rows, any)
            by_head = (*q_.shape[:-1], v.shape[-1])
            outputs.append(output.reshape(by_head))
        return mx.concatenate(outputs, 1)

    def backward(
        self, slope: mx.array, q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None = None
    ) -> list[mx.array]:
        """Return the gradients by queries, keys, values and a mask that is added to the scores.

        Source: Dao et al. 2022 (arXiv:2205.14135), appendix B.2.

        Args:
            slope: gradient by the output, ``(batch, heads, length, any)``.
            q: queries.
            k: keys.
            v: values.
            mask: as ``forward`` has it.
        """
        by_piece: list[list[mx.array]] = []
        mask = self._full_mask(mask, q, k)
        for (q_, k_, v_, slope_), added in self._cut(mask, q, k, v, slope):
            # Nothing may be computed before the slope is there, or it would be kept since the
            # forward pass; and one piece comes after the other.
            before = [slope, *(gradients[0] for gradients in by_piece[-1:])]
            q_, k_, v_ = mx.depends([q_, k_, v_], before)
            by_piece.append(self._piece_backward(slope_, q_, k_, v_, added))
        by_q, by_k, by_v, *by_mask = [list(parts) for parts in zip(*by_piece, strict=True)]
        gradients = [mx.concatenate(parts, 1) for parts in (by_q, by_k, by_v)]
        if mask is None or self.hard:
            return gradients
        (parts,) = by_mask
        if mask.shape[1] > 1:
            return [*gradients, mx.concatenate(parts, 1)]
        total = parts[0]  # all heads share the mask, so all pieces do
        for part in parts[1:]:
            total = total + part
        return [*gradients, total]

    def _piece_backward(
        self, slope: mx.array, q: mx.array, k: mx.array, v: mx.array, added: mx.array | None
    ) -> list[mx.array]:
        """Return the gradients of one piece; by the mask only if it is added to the scores.

        The division by the sums is left to arrays without the length squared.
        """
        rows, exponentials, inverse_sums, sees = self._softmax(q, k, added)
        thin = self._as_rows(slope) * inverse_sums  # (batch, groups, rows, any)
        by_v = exponentials.swapaxes(-1, -2) @ thin
        # the part of the gradient that all scores of a row share, (batch, groups, rows, 1)
        output = exponentials @ v  # not yet divided
        common = (thin * output).sum(-1, keepdims=True) * inverse_sums
        if sees is not None:
            thin = thin * sees
            common = common * sees
        by_probability = thin @ v.swapaxes(-1, -2)
        by_score = exponentials * (by_probability - common)
        by_rows = (by_score @ k) * self.scale
        by_q = by_rows.reshape(q.shape)
        by_k = by_score.swapaxes(-1, -2) @ rows
        if added is None or self.hard:
            return [by_q, by_k, by_v]
        by_head = by_score.reshape(q.shape[:-1] + k.shape[-2:-1])  # as the mask has it
        broadcast = [axis for axis, size in enumerate(added.shape) if size == 1]
        by_mask = by_head.sum(broadcast, keepdims=True)
        return [by_q, by_k, by_v, by_mask]

    def _full_mask(self, mask: mx.array | None, q: mx.array, k: mx.array) -> mx.array | None:
        """Return the mask; the causal one ``(1, 1, length, others)`` is made anew, not kept."""
        if mask is not None or not self.hard:
            return mask
        length = q.shape[2]
        others = k.shape[2]
        position = mx.arange(others - length, others)  # the last ones are the queries'
        return (position[:, None] >= mx.arange(others))[None, None]

    def _cut(
        self, mask: mx.array | None, *arrays: mx.array
    ) -> Iterator[tuple[list[mx.array], mx.array | None]]:
        """Return what each piece reads of the arrays, and what is added to its scores."""
        shared = mask is not None and mask.shape[1] == 1  # by all heads
        added = self._to_add(mask) if mask is not None and shared else None
        for n in range(self.pieces):
            parts = [self._piece(array, n) for array in arrays]
            if mask is not None and not shared:
                heads = parts[0].shape[1]
                added = self._to_add(mask[:, n * heads : (n + 1) * heads])
            yield parts, added

    def _piece(self, array: mx.array, n: int) -> mx.array:
        """Return the heads or groups of piece n."""
        size = array.shape[1] // self.pieces
        return array[:, n * size : (n + 1) * size]

    def _to_add(self, mask: mx.array) -> mx.array:
        """Return what is added to the scores.

        No number is infinite, so a row that sees nothing sees everything, as in MLX.
        """
        return mx.where(mask, mx.array(0.0), mx.array(_LOWEST)) if self.hard else mask

    def _softmax(self, q: mx.array, k: mx.array, added: mx.array | None) -> _Softmax:
        """Return the softmax of a piece's scores.

        Args:
            q: ``(batch, heads of the piece, length, width)``.
            k: ``(batch, groups of the piece, others, width)``.
            added: to the scores, ``(batch, heads of the piece, length, others)`` or broadcast.
        """
        rows = self._as_rows(q * self.scale)
        scores = rows @ k.swapaxes(-1, -2)  # (batch, groups, rows, others)
        if added is not None:
            by_head = scores.reshape(q.shape[:-1] + k.shape[-2:-1])  # as the mask has it
            scores = (by_head + added).reshape(scores.shape)
        top = scores.max(-1, keepdims=True)
        exponentials = exp(scores, top)
        inverse_sums = 1 / exponentials.sum(-1, keepdims=True)
        sees = top > _LOWEST / 2 if self.hard else None
        return _Softmax(rows, exponentials, inverse_sums, sees)

    def _as_rows(self, a: mx.array) -> mx.array:
        """Fold the heads of a group into its rows: one product instead of one for each head.

        ``(batch, heads, length, width)`` → ``(batch, groups, heads / groups · length, width)``.
        """
        batch, heads, length, width = a.shape
        return a.reshape(batch, heads // self.served, self.served * length, width)
