"""Searches scale and bias of every group for the least output error, in MLX's affine format.

The stored format is unchanged, so stock mlx-lm opens the result. Knows no model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from qlab.core.config.quant import PackedArrays, QuantConfig
from qlab.core.config.solver import Solver
from qlab.errors import ConfigError
from qlab.ops.packing import pack
from qlab.registry import LazyModule

if TYPE_CHECKING:
    import mlx.core as mx
    import numpy as np
else:
    mx = LazyModule("mlx.core")

_MODES = ("affine",)
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6)  # of a group's range, each tried
_REFITS = 2  # of scale and bias to the codes, for each range
_BLOCK = 1 << 22  # weights searched at once


class Searched(Solver):
    """Least Σ_i E[x_i²]·(w_i − ŵ_i)² per group, by shrunken ranges and refitted scales and biases.

    Weighing by the inputs' second moments is what makes the search worth while: without it the
    weight error falls and the output does not improve (docs/log.md). For given codes the best scale
    and bias are a weighted least-squares line. Every candidate is scored with scale and bias
    rounded as stored, and round-to-nearest is among the candidates, so no group gets worse than
    that.
    """

    name = "searched"
    title = "scale and bias searched for least output error (needs a text)"
    needs_inputs = True
    modes = _MODES

    def solve(
        self,
        weight: mx.array,
        config: QuantConfig,
        input_power: np.ndarray | None = None,
    ) -> PackedArrays:
        if config.mode not in _MODES:
            raise ConfigError(
                f"Solver 'searched' fills mode 'affine', not {config.mode!r}; "
                "use solver 'rtn' for it."
            )
        width = weight.shape[-1]
        power = mx.ones(width) if input_power is None else mx.array(input_power)
        rows = weight.reshape(-1, width)
        step = max(1, _BLOCK // width)
        parts = []
        for start in range(0, rows.shape[0], step):
            block = rows[start : start + step]
            part = _search(block, power, config)
            mx.eval(part)  # one block in flight: the search needs several float32 copies of it
            parts.append(part)
        packed = {}
        for name in ("weight", "scales", "biases"):
            arrays = [part[name] for part in parts]
            array = mx.concatenate(arrays)
            packed[name] = array.reshape(*weight.shape[:-1], -1)
        return packed


class _Groups(NamedTuple):
    """Weights whose scales and biases are searched, and what each counts for.

    Attributes:
        weights: float32 ``(rows, groups, group_size)``.
        importance: of the inputs, float32 ``(1, groups, group_size)``.
        top: largest code.
    """

    weights: mx.array
    importance: mx.array
    top: int


class _Candidate(NamedTuple):
    """A scale and a bias for every group, and what they cost.

    Attributes:
        error: weighted squared error, float32 ``(rows, groups)``.
        scale: as stored, ``(rows, groups)`` in the weight's dtype.
        bias: as stored, ``(rows, groups)`` in the weight's dtype.
    """

    error: mx.array
    scale: mx.array
    bias: mx.array


def _search(rows: mx.array, power: mx.array, config: QuantConfig) -> PackedArrays:
    """Search the groups of some rows.

    Args:
        rows: ``(rows, in)``.
        power: mean square of each input feature, ``(in,)``.
        config: bits and group size.

    Returns:
        Packed codes, scales and biases of the rows.
    """
    top = 2**config.bits - 1
    groups = _grouped(rows, power, config.group_size, top)
    _, scale, *biases = mx.quantize(rows, config.group_size, config.bits)
    best = _scored(groups, scale, biases[0])
    low = groups.weights.min(-1)
    high = groups.weights.max(-1)
    for shrink in _SHRINKS:
        scale = (high - low) * (shrink / top)
        bias = (low + high) / 2 - (high - low) * (shrink / 2)
        for _ in range(_REFITS):
            codes = _codes(groups, scale, bias)
            scale, bias = _refit(groups, codes)
            stored_scale = scale.astype(rows.dtype)
            stored_bias = bias.astype(rows.dtype)
            candidate = _scored(groups, stored_scale, stored_bias)
            best = _better(best, candidate)

    scale = best.scale.astype(mx.float32)
    bias = best.bias.astype(mx.float32)
    codes = _codes(groups, scale, bias).astype(mx.uint32)
    packed = pack(codes.reshape(rows.shape), config.bits)
    return {"weight": packed, "scales": best.scale, "biases": best.bias}


def _grouped(rows: mx.array, power: mx.array, size: int, top: int) -> _Groups:
    """Part rows ``(rows, in)`` and the inputs' mean squares ``(in,)`` into groups."""
    weights = rows.astype(mx.float32)
    weights = weights.reshape(rows.shape[0], -1, size)
    # a little of the mean keeps groups whose inputs are all zero defined
    importance = power + 1e-6 * power.mean() + 1e-30
    importance = importance.reshape(1, -1, size)
    return _Groups(weights, importance, top)


def _codes(groups: _Groups, scale: mx.array, bias: mx.array) -> mx.array:
    """Nearest codes 0…top, float32 ``(rows, groups, group_size)``."""
    safe = mx.where(scale == 0, 1.0, scale)
    above_bias = groups.weights - bias[..., None]
    steps = above_bias / safe[..., None]
    nearest = mx.round(steps)
    return mx.clip(nearest, 0, groups.top)


def _scored(groups: _Groups, scale: mx.array, bias: mx.array) -> _Candidate:
    """Weigh the squared error of each group, with the scale and bias that are stored."""
    scale32 = scale.astype(mx.float32)
    bias32 = bias.astype(mx.float32)
    codes = _codes(groups, scale32, bias32)
    stored = codes * scale32[..., None] + bias32[..., None]
    error = stored - groups.weights
    weighted = groups.importance * mx.square(error)
    return _Candidate(weighted.sum(-1), scale, bias)


def _better(old: _Candidate, new: _Candidate) -> _Candidate:
    """Take the better of two candidates, group by group; the old one where they are equal."""
    wins = new.error < old.error
    return _Candidate(
        error=mx.where(wins, new.error, old.error),
        scale=mx.where(wins, new.scale, old.scale),
        bias=mx.where(wins, new.bias, old.bias),
    )


def _refit(groups: _Groups, codes: mx.array) -> tuple[mx.array, mx.array]:
    """Weighted least squares of weights on codes, w ≈ scale·q + bias, for every group.

    With means weighted by the importance h: scale = Σh(q − q̄)w / Σh(q − q̄)², bias = w̄ − scale·q̄.
    """
    weights = groups.weights
    importance = groups.importance
    total = importance.sum(-1)
    weighted_codes = importance * codes
    code_mean = weighted_codes.sum(-1) / total
    weighted_weights = importance * weights
    weight_mean = weighted_weights.sum(-1) / total
    centred = codes - code_mean[..., None]
    squares = importance * mx.square(centred)
    spread = squares.sum(-1)
    products = importance * centred * weights
    safe = mx.where(spread == 0, 1.0, spread)
    scale = products.sum(-1) / safe
    bias = weight_mean - scale * code_mean
    return scale, bias


SHELF = (Searched(),)
