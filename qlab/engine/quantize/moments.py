"""One pass over the weights of a layer: sums from which every slider position is estimated.

``table_filler`` reads each layer once with ``moments``, and once more with ``weighted_ranges``
after a calibration. A layer is read in blocks of rows, so that a large one is never in float32
whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from qlab.core.config.spec import LayerSpec
from qlab.errors import WeightsError
from qlab.ops.sums import stable_sum

_BLOCK_WEIGHTS = 1 << 24  # read at once
GROUPS = (32, 64, 128)  # each a multiple of the one before

# Importance of a weight matrix's entries, as a sum of outer products r ⊗ c: vectors of lengths
# ``out`` and ``in``.
ImportancePairs = Sequence[tuple[np.ndarray, np.ndarray]]


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


def moments(layer: LayerSpec, weight: mx.array) -> LayerMoments:
    """Compute the moments of a layer.

    Args:
        layer: the layer, for the error message.
        weight: ``(…, out, in)``.

    Raises:
        WeightsError: a weight is NaN or infinite.
    """
    power_sums = np.zeros(4)  # Σw, Σw², Σw³, Σw⁴
    amax = 0.0
    squared_ranges = {group: 0.0 for group in GROUPS if layer.shape[-1] % group == 0}
    for _, rows in _row_blocks(weight):
        square = mx.square(rows)
        powers = [rows, square, square * rows, mx.square(square)]
        block_sums = mx.stack([stable_sum(power) for power in powers])
        block_amax = mx.abs(rows).max()
        ranges = {group: stable_sum(squared) for group, squared in _squared_ranges(rows)}
        mx.eval(block_sums, block_amax, ranges)
        power_sums += np.array(block_sums, np.float64)
        if not np.isfinite(power_sums).all():
            raise WeightsError(
                f"Layer {layer.path!r} holds NaN or infinite weights; nothing was quantized."
            )
        amax = max(amax, _number(block_amax))
        for group, total in ranges.items():
            squared_ranges[group] += group * _number(total)
    return LayerMoments(
        sum_sq=float(power_sums[1]),
        amax=amax,
        kurtosis=_kurtosis(power_sums / layer.size),
        squared_ranges=squared_ranges,
    )


def weighted_ranges(weight: mx.array, pairs: ImportancePairs) -> dict[int, float]:
    """Sum (max − min)² of each weight's group, counted by the weight's importance.

    Importance is Σ_p r_p[o]·c_p[i].

    Args:
        weight: ``(out, in)``.
        pairs: ``(r, c)`` vectors of lengths ``out`` and ``in``.

    Returns:
        The sum by group size that divides the width.
    """
    total: dict[int, float] = {}
    for start, rows in _row_blocks(weight):
        stop = start + rows.shape[0]
        for group, squared in _squared_ranges(rows):  # (rows, groups)
            for r, c in pairs:
                importance_of_group = mx.array(c.reshape(-1, group).sum(1))
                of_rows = np.array(squared @ importance_of_group, np.float64)
                total[group] = total.get(group, 0.0) + float(r[start:stop] @ of_rows)
    return total


def _number(scalar: mx.array) -> float:
    """Return an array of one element as a float (MLX's stub says that it may be complex)."""
    return float(np.array(scalar))


def _row_blocks(weight: mx.array) -> Iterator[tuple[int, mx.array]]:
    """Yield first row and float32 rows of a weight whose leading dimensions are flattened."""
    flat = weight.reshape(-1, weight.shape[-1])
    step = max(1, _BLOCK_WEIGHTS // flat.shape[1])
    for start in range(0, flat.shape[0], step):
        yield start, flat[start : start + step].astype(mx.float32)


def _squared_ranges(rows: mx.array) -> Iterator[tuple[int, mx.array]]:
    """Yield each group size that divides the width, and (max − min)² of its groups.

    Args:
        rows: ``(rows, in)``.

    Yields:
        Group size, and float32 ``(rows, in / group)``.
    """
    high = rows
    low = rows
    merged = 1  # weights that an entry of high and low stands for
    for group in GROUPS:
        if rows.shape[1] % group:
            return
        # (rows, groups, entries within): the maxima of small groups give those of larger ones
        shape = (rows.shape[0], -1, group // merged)
        high = high.reshape(shape).max(-1)
        low = low.reshape(shape).min(-1)
        merged = group
        yield group, mx.square(high - low)


def _kurtosis(mean: np.ndarray) -> float:
    """Fourth standardized moment from the means of w, w², w³, w⁴; NaN for constant weights."""
    m1, m2, m3, m4 = mean
    variance = m2 - m1**2
    if not variance > 0:
        return float("nan")
    fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
    return float(fourth / variance**2)
