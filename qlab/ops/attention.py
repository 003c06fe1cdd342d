"""Attention for training on a CPU, with a gradient of its own.

It keeps queries, keys and values, and nothing as long squared.

MLX's CPU computes attention in steps, the exponentials one at a time, and repeats keys and values
for the heads that share them. Here the heads of a group are rows of one product, one group after
the other. Knows no model, only how mlx-lm calls it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from qlab.ops.attention_tiles import whole_tiles
from qlab.ops.custom_gradient import with_gradient
from qlab.ops.exponential import exp, is_slow
from qlab.runtime.device import backend

_LOWEST = mx.finfo(mx.float32).min
_PIECES = 8  # at most: they are smaller, so faster, and more of them are more to compile


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

    What is not written out here is left to it, on CUDA in whole tiles.

    Args:
        queries: ``(batch, heads, length, width)``.
        keys: ``(batch, groups, others, width)``, each group serving ``heads / groups`` heads.
        values: ``(batch, groups, others, any)``.
        cache: as the model hands it on.
        scale: of the products of queries and keys.
        mask: ``causal``, or what can be broadcast to ``(batch, heads, length, others)``: true where
            a position is seen, or numbers that are added.
        sinks: see there.
    """
    plain = all(a.ndim == 4 and is_slow(a) for a in (queries, keys, values))
    known = (
        mask.dtype in (mx.bool_, mx.float32)
        if isinstance(mask, mx.array)
        else mask in (None, "causal")
    )
    if not (plain and known) or sinks is not None or hasattr(cache, "bits"):
        from mlx_lm.models.base import scaled_dot_product_attention as stock

        given = (
            whole_tiles(queries, keys, values, mask)
            if backend() == "cuda"
            else (queries, keys, values, mask)
        )
        return stock(*given[:3], cache, scale, given[3], sinks)[:, :, : queries.shape[2]]
    heads = queries.shape[1]
    groups = keys.shape[1]
    hard = mask is not None and (not isinstance(mask, mx.array) or mask.dtype == mx.bool_)
    how = _Attention(
        scale, heads // groups, max(n for n in range(1, _PIECES + 1) if groups % n == 0), hard
    )
    given = [queries, keys, values]
    if not isinstance(mask, mx.array):
        return with_gradient(how.forward, how.backward, given)
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    return with_gradient(
        how.forward, how.backward, [*given, *([] if hard else [mask])], [mask] if hard else []
    )


@dataclass(frozen=True)
class _Attention:
    """How attention is computed.

    Attributes:
        scale: of the scores.
        served: heads that a group serves.
        pieces: in how many it is computed, some groups each.
        hard: whether a mask says what is seen, instead of being added; without one, no position
            sees a later one.
    """

    scale: float
    served: int
    pieces: int
    hard: bool

    def forward(
        self, q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None = None
    ) -> mx.array:
        """Return the output, ``(batch, heads, length, any)``."""
        made: list[mx.array] = []
        for q_, k_, v_, mask_ in self._cut(self._seen(mask, q, k), q, k, v):
            (k_,) = mx.depends([k_], made[-1:])  # one piece after the other
            _, each, share, _ = self._softmax(q_, k_, mask_)
            made.append(((each @ v_) * share).reshape(*q_.shape[:-1], v.shape[-1]))
        return mx.concatenate(made, 1)

    def backward(
        self, slope: mx.array, q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None = None
    ) -> list[mx.array]:
        """Return the gradients by queries, keys, values and what is added to the scores.

        Dao et al. 2022, arXiv:2205.14135, appendix B.2, the division by the sums left to what has
        no length squared.
        """
        made: list[list[mx.array]] = []
        mask = self._seen(mask, q, k)
        for q_, k_, v_, slope_, mask_ in self._cut(mask, q, k, v, slope):
            # nothing may be computed before the slope is there, or it would be kept since the way
            # forward
            q_, k_, v_ = mx.depends([q_, k_, v_], [slope, *(made[-1][:1] if made else [])])
            rows, each, share, sees = self._softmax(q_, k_, mask_)
            thin = self._folded(slope_) * share
            by_v = each.swapaxes(-1, -2) @ thin
            common = (thin * (each @ v_)).sum(-1, keepdims=True) * share
            if sees is not None:
                thin = thin * sees
                common = common * sees
            by_score = each * (thin @ v_.swapaxes(-1, -2) - common)
            made.append(
                [
                    ((by_score @ k_) * self.scale).reshape(q_.shape),
                    by_score.swapaxes(-1, -2) @ rows,
                    by_v,
                ]
            )
            if mask_ is not None and not self.hard:
                full = by_score.reshape(q_.shape[:-1] + k_.shape[-2:-1])
                made[-1].append(
                    full.sum([i for i, n in enumerate(mask_.shape) if n == 1], keepdims=True)
                )
        found = [mx.concatenate(parts, 1) for parts in list(zip(*made, strict=True))[:3]]
        if mask is None or self.hard:
            return found
        parts = [each[3] for each in made]
        return [
            *found,
            sum(parts[1:], parts[0]) if mask.shape[1] == 1 else mx.concatenate(parts, 1),
        ]

    def _seen(self, mask: mx.array | None, q: mx.array, k: mx.array) -> mx.array | None:
        """Return the mask.

        One that only says that no position sees a later one is made anew rather than kept.
        """
        if mask is not None or not self.hard:
            return mask
        length = q.shape[2]
        others = k.shape[2]
        return (mx.arange(others - length, others)[:, None] >= mx.arange(others))[None, None]

    def _cut(self, mask: mx.array | None, *arrays: mx.array) -> Iterator[list[Any]]:
        """Return what each piece reads, the numbers that are added to its scores last."""
        one = None if mask is None or mask.shape[1] > 1 else self._added(mask)
        for n in range(self.pieces):
            own = [
                a[:, n * (a.shape[1] // self.pieces) : (n + 1) * (a.shape[1] // self.pieces)]
                for a in arrays
            ]
            heads = own[0].shape[1]
            yield [
                *own,
                one
                if mask is None or one is not None
                else self._added(mask[:, n * heads : (n + 1) * heads]),
            ]

    def _added(self, mask: mx.array) -> mx.array:
        """Return what is added to the scores. A row that sees nothing sees everything, as in MLX.

        No number is infinite.
        """
        return mx.where(mask, mx.array(0.0), mx.array(_LOWEST)) if self.hard else mask

    def _softmax(
        self, q: mx.array, k: mx.array, mask: mx.array | None
    ) -> tuple[mx.array, mx.array, mx.array, mx.array | None]:
        """Return scaled queries, exponentials of the scores, one over their sums, and where a row
        sees anything if not all do.

        The heads of a group are its rows: ``(batch, groups, heads / groups · length, …)``.
        """
        rows = self._folded(q * self.scale)
        scores = rows @ k.swapaxes(-1, -2)
        if mask is not None:
            scores = (scores.reshape(q.shape[:-1] + k.shape[-2:-1]) + mask).reshape(scores.shape)
        top = scores.max(-1, keepdims=True)
        each = exp(scores, top)
        return rows, each, 1 / each.sum(-1, keepdims=True), top > _LOWEST / 2 if self.hard else None

    def _folded(self, a: mx.array) -> mx.array:
        batch, heads, length, width = a.shape
        return a.reshape(batch, heads // self.served, self.served * length, width)
