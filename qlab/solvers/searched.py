"""Searches scale and bias of every group for the least output error, in the unchanged affine
format. Knows no model.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from qlab.core.config.quant import QuantConfig
from qlab.core.config.solver import Solver
from qlab.errors import ConfigError
from qlab.ops.packing import pack

_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6)
_REFITS = 2
_BLOCK = 1 << 22  # weights searched at once


class Searched(Solver):
    """Least Σ_i E[x_i²]·(w_i − ŵ_i)² per group, by trying shrunken ranges and refitting scale and
    bias to the codes.

    Weighing by the inputs' second moments is what makes the search worth while: without it the
    weight error falls and the output does not improve (docs/log.md). For given codes the best scale
    and bias are a weighted least-squares line. Every candidate is scored with scale and bias
    rounded as stored, and round-to-nearest is among the candidates, so no group gets worse than
    that.
    """

    name = "searched"
    title = "scale and bias searched for least output error (needs a text)"
    needs_inputs = True
    modes = ("affine",)

    def solve(self, weight: Any, config: QuantConfig, input_power: Any = None) -> dict[str, Any]:
        if config.mode not in self.modes:
            raise ConfigError(
                f"Solver 'searched' fills mode 'affine', not {config.mode!r}; use solver 'rtn' for it."
            )
        power = mx.ones(weight.shape[-1]) if input_power is None else mx.array(input_power)
        flat = weight.reshape(-1, weight.shape[-1])
        step = max(1, _BLOCK // flat.shape[1])
        parts = []
        for start in range(0, flat.shape[0], step):
            parts.append(_search(flat[start : start + step], power, config))
            mx.eval(parts[-1])  # one block in flight: the search needs several float32 copies of it
        found = (mx.concatenate(part) for part in zip(*parts, strict=True))
        names = ("weight", "scales", "biases")
        return {n: a.reshape(*weight.shape[:-1], -1) for n, a in zip(names, found, strict=True)}


def _search(
    rows: mx.array, power: mx.array, config: QuantConfig
) -> tuple[mx.array, mx.array, mx.array]:
    """Search the groups of some rows; return packed codes, scales and biases of the rows."""
    top = 2**config.bits - 1
    w = rows.astype(mx.float32).reshape(rows.shape[0], -1, config.group_size)
    # a little of the mean keeps groups whose inputs are all zero defined
    h = (power + 1e-6 * power.mean() + 1e-30).reshape(1, -1, config.group_size)
    _, scale, bias = mx.quantize(rows, config.group_size, config.bits)
    best = _score(w, h, scale, bias, top)
    low = w.min(-1)
    high = w.max(-1)
    for shrink in _SHRINKS:
        s = (high - low) * (shrink / top)
        b = (low + high) / 2 - (high - low) * (shrink / 2)
        for _ in range(_REFITS):
            s, b = _refit(w, h, _codes(w, s, b, top))
            best = _better(best, _score(w, h, s.astype(rows.dtype), b.astype(rows.dtype), top))
    _, s, b = best
    codes = _codes(w, s.astype(mx.float32), b.astype(mx.float32), top)
    packed = pack(codes.astype(mx.uint32).reshape(rows.shape), config.bits)
    return packed, s, b


def _codes(w: mx.array, s: mx.array, b: mx.array, top: int) -> mx.array:
    safe = mx.where(s == 0, 1.0, s)
    return mx.clip(mx.round((w - b[..., None]) / safe[..., None]), 0, top)


def _score(
    w: mx.array, h: mx.array, s: mx.array, b: mx.array, top: int
) -> tuple[mx.array, mx.array, mx.array]:
    """Weighted squared error of each group, with the scale and bias that are stored."""
    s32 = s.astype(mx.float32)
    b32 = b.astype(mx.float32)
    error = _codes(w, s32, b32, top) * s32[..., None] + b32[..., None] - w
    return (h * mx.square(error)).sum(-1), s, b


def _better(old: tuple, new: tuple) -> tuple:
    wins = new[0] < old[0]
    return tuple(mx.where(wins, n, o) for n, o in zip(new, old, strict=True))


def _refit(w: mx.array, h: mx.array, q: mx.array) -> tuple[mx.array, mx.array]:
    """Weighted least squares of w on q: the scale and bias that suit the codes best."""
    total = h.sum(-1)
    q_mean = (h * q).sum(-1) / total
    w_mean = (h * w).sum(-1) / total
    centred = q - q_mean[..., None]
    spread = (h * mx.square(centred)).sum(-1)
    s = (h * centred * w).sum(-1) / mx.where(spread == 0, 1.0, spread)
    return s, w_mean - s * q_mean


SHELF = (Searched(),)
