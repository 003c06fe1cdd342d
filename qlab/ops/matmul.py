"""Products routed to experts, and products added to what is there already.

Used by frozen layers and adapters (``qlab.nn``, ``qlab.adapters``).
"""

from __future__ import annotations

import mlx.core as mx


def routed(x: mx.array, weights: mx.array, indices: mx.array, sorted_indices: bool) -> mx.array:
    """Return x·Wᵀ, every row of x with the weight of its own expert.

    Args:
        x: ``(…, 1, in)``.
        weights: ``(experts, out, in)``.
        indices: ``(…)``, the expert of every row; a row of x may serve several.
        sorted_indices: whether they ascend.

    Returns:
        ``(…, 1, out)``.
    """
    transposed = weights.swapaxes(-1, -2)  # (experts, in, out)
    return mx.gather_mm(x, transposed, rhs_indices=indices, sorted_indices=sorted_indices)


def add_product(y: mx.array, z: mx.array, factor: mx.array) -> mx.array:
    """Return y + z·factor in one pass over y, ``(…, out)``.

    Args:
        y: ``(…, out)``.
        z: ``(…, rank)``.
        factor: ``(rank, out)``; cast to z's dtype.
    """
    rows = y.reshape(-1, y.shape[-1])  # addmm wants matrices
    thin = z.reshape(-1, z.shape[-1])
    factor = factor.astype(z.dtype)
    return mx.addmm(rows, thin, factor).reshape(y.shape)
