"""Products that may be routed to experts, and sums upon them."""

from __future__ import annotations

import mlx.core as mx


def routed(x: mx.array, weights: mx.array, indices: mx.array, sorted_indices: bool) -> mx.array:
    """Return x·Wᵀ, every row of x with the weight of its own expert.

    Args:
        x: ``(…, 1, in)``.
        weights: ``(experts, out, in)``.
        indices: ``(…)``, the expert of every row; a row of x may serve several.
        sorted_indices: whether they ascend.
    """
    return mx.gather_mm(
        x, weights.swapaxes(-1, -2), rhs_indices=indices, sorted_indices=sorted_indices
    )


def onto(y: mx.array, z: mx.array, factor: mx.array) -> mx.array:
    """Return y + z·factor in one pass over y.

    Args:
        y: ``(…, out)``.
        z: ``(…, rank)``.
        factor: ``(rank, out)``.
    """
    rows = y.reshape(-1, y.shape[-1])
    return mx.addmm(rows, z.reshape(-1, z.shape[-1]), factor.astype(z.dtype)).reshape(y.shape)
