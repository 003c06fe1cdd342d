"""One pass over the weights of a layer: what every slider position can be computed from.

Reads a layer in blocks of rows, so that a large one is never held in float32 whole. Knows no
scheme.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from qlab.core.config.spec import LayerSpec
from qlab.errors import WeightsError

_BLOCK = 1 << 24  # weights read at once
GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class LayerMoments:
    """Sums over all weights of a layer.

    Attributes:
        sum_sq: Σw².
        amax: max |w|.
        kurtosis: n·Σ(w−m)⁴ / (Σ(w−m)²)², 3 for a Gaussian.
        squared_ranges: by group size that divides the width, Σ over weights of (max − min)² of
            their group.
    """

    sum_sq: float
    amax: float
    kurtosis: float
    squared_ranges: dict[int, float]


def _blocks(weight: mx.array) -> Iterator[tuple[int, mx.array]]:
    """Yield first row and float32 rows of a weight whose leading dimensions are flattened."""
    flat = weight.reshape(-1, weight.shape[-1])
    step = max(1, _BLOCK // flat.shape[1])
    for start in range(0, flat.shape[0], step):
        yield start, flat[start : start + step].astype(mx.float32)


def _ranges(rows: mx.array) -> Iterator[tuple[int, mx.array]]:
    """Yield each group size that divides the width, and (max − min)² of its groups, ``(rows,
    groups)``.
    """
    high = low = rows
    held = 1
    for group in GROUPS:
        if rows.shape[1] % group:
            return
        shape = (rows.shape[0], -1, group // held)
        high = high.reshape(shape).max(-1)
        low = low.reshape(shape).min(-1)
        held = group
        yield group, mx.square(high - low)


def moments(layer: LayerSpec, weight: mx.array) -> LayerMoments:
    """Compute the moments of a layer.

    Args:
        layer: the layer, for the error message.
        weight: ``(…, out, in)``.

    Raises:
        WeightsError: a weight is NaN or infinite.
    """
    power = np.zeros(4)
    amax = 0.0
    spans = dict.fromkeys((g for g in GROUPS if layer.shape[-1] % g == 0), 0.0)
    for _, rows in _blocks(weight):
        square = mx.square(rows)
        parts = [
            rows.sum(),
            square.sum(),
            (square * rows).sum(),
            mx.square(square).sum(),
            mx.abs(rows).max(),
        ]
        ranges = [(group, squared.sum()) for group, squared in _ranges(rows)]
        mx.eval(parts, [value for _, value in ranges])
        power += [part.item() for part in parts[:4]]
        amax = max(amax, parts[4].item())
        if not np.isfinite(power).all():
            raise WeightsError(
                f"Layer {layer.path!r} holds NaN or infinite weights; nothing was quantized."
            )
        for group, value in ranges:
            spans[group] += group * value.item()
    return LayerMoments(power[1], amax, _kurtosis(power / layer.size), spans)


def _kurtosis(mean: np.ndarray) -> float:
    """Fourth standardized moment from the means of w, w², w³, w⁴."""
    m1, m2, m3, m4 = mean
    variance = m2 - m1**2
    return (
        float((m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4) / variance**2)
        if variance > 0
        else float("nan")
    )


def weighted_ranges(
    weight: mx.array, pairs: list[tuple[np.ndarray, np.ndarray]]
) -> dict[int, float]:
    """Sum over weights of (max − min)² of their group, each counted by its importance Σ_p
    r_p[o]·c_p[i].

    Args:
        weight: ``(out, in)``.
        pairs: ``(r, c)`` vectors of lengths ``out`` and ``in``.

    Returns:
        The sum by group size that divides the width.
    """
    total: dict[int, float] = {}
    for start, rows in _blocks(weight):
        for group, squared in _ranges(rows):
            for r, c in pairs:
                part = (
                    mx.array(r[start : start + rows.shape[0]])
                    @ squared
                    @ mx.array(c.reshape(-1, group).sum(1))
                )
                total[group] = total.get(group, 0.0) + part.item()
    return total
