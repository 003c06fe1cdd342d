"""The quantization error of a layer and its leading directions under three weightings.

With E = W − Ŵ and U the leading left singular vectors of E·S, the best correction of rank r in the
norm ‖(E − C)·S‖ is C = U·Uᵀ·E, so neither S nor its inverse is needed beyond the product E·S:

- ``residual``: S = 1, no data (ZeroQuant-V2's LoRC, arXiv:2303.08302).
- ``diagonal``: S² = diag E[x²] (LQER, arXiv:2402.02446; QERA, arXiv:2410.06040, theorem 2).
- ``qera``: S·Sᵀ = E[x xᵀ], damped (QERA, theorem 1): the least squared error of the output that the
  rank allows.

``init.py`` makes adapters of them, ``recovery.py`` measures what they recover. Runs on the MLX
thread.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from qlab.engine.adapt.activations import Inputs
from qlab.errors import WeightsError

WeightOf = Callable[[str], mx.array]  # the weight of a layer by its path
STARTS = ("residual", "diagonal", "qera")
ALL_UP_TO = 1024  # width up to which all singular values are computed; above, the leading ones
_ROUNDS = 4  # of subspace iteration
_TINY_SHARE = 1e-10  # of the largest eigenvalue, below which one counts as 0
_TINY = 1e-30


def error_of(path: str, original: WeightOf, stored: WeightOf) -> tuple[mx.array, mx.array]:
    """Return E = W − Ŵ and W of a layer, float32 ``(…, out, in)``.

    Args:
        path: of the layer.
        original: returns W by path.
        stored: returns Ŵ by path.

    Raises:
        WeightsError: a weight is NaN or infinite.
    """
    weight = original(path).astype(mx.float32)
    stored_weight = stored(path).astype(mx.float32)
    error = weight - stored_weight
    is_finite = mx.isfinite(error).all()
    if not is_finite.item():
        raise WeightsError(
            f"Layer {path!r} holds NaN or infinite weights; its quantization error is no number."
        )
    return error, weight


def directions(
    init: str, error: mx.array, inputs: Inputs | None, rank: int
) -> tuple[mx.array, np.ndarray]:
    """Return the left singular vectors and squared singular values of E·S.

    A layer that saw no text counts all inputs alike.

    Args:
        init: which S; one of ``STARTS``.
        error: E, float32 ``(out, in)``.
        inputs: of the layer, or None.
        rank: how many are needed at least.

    Returns:
        float32 ``(out, k)`` and float64 ``(k,)``, descending.
    """
    if init == "residual" or inputs is None:
        return leading(error, rank)
    if init == "diagonal":
        scales = mx.sqrt(inputs.power)
        return leading(error * scales, rank)
    out, width = error.shape
    if width <= out:
        return leading(error @ inputs.root, rank)
    # [E·Xᵀ/√n, E·√damping] has the Gram matrix E·(E[x xᵀ] + damping)·Eᵀ, but no array of the
    # input's width squared is made
    outputs = error @ inputs.seen.T  # (out, tokens)
    of_text = outputs * len(inputs.seen) ** -0.5
    of_damping = error * inputs.damping**0.5
    product = mx.concatenate([of_text, of_damping], axis=1)
    return leading(product, rank)


def leading(product: mx.array, rank: int) -> tuple[mx.array, np.ndarray]:
    """Return the leading left singular vectors and squared singular values of a matrix.

    Up to a width of 1024 all of them, from the eigenvectors of the smaller Gram matrix; above by
    subspace iteration (Halko, Martinsson & Tropp, arXiv:0909.4061, algorithm 4.4), which for a flat
    spectrum finds the directions roughly but their energy well.

    Args:
        product: float32 ``(out, n)``.
        rank: how many are needed at least.

    Returns:
        float32 ``(out, k)`` and float64 ``(k,)``, descending.
    """
    out, width = product.shape
    narrow = min(out, width)
    if narrow > ALL_UP_TO and 4 * rank < narrow:
        return _by_iteration(product, rank)
    if out <= width:
        gram = product @ product.T
        squares, vectors = _eigen(gram)
        return vectors, squares
    gram = product.T @ product
    squares, right = _eigen(gram)
    smallest = max(squares[0] * _TINY_SHARE, _TINY)
    lengths = np.sqrt(np.maximum(squares, smallest))
    left = product @ right
    left = left / mx.array(lengths, mx.float32)
    return left, squares


def _by_iteration(product: mx.array, rank: int) -> tuple[mx.array, np.ndarray]:
    """Return ``rank`` left singular vectors and squares by subspace iteration."""
    more = max(16, rank // 4)  # directions beyond the rank, which steady the last of it
    shape = (product.shape[0], rank + more)
    key = mx.random.key(0)
    basis = mx.random.normal(shape, key=key)
    for _ in range(_ROUNDS):
        turned = product.T @ basis
        turned = product @ turned
        # mlx's stub leaves out that qr takes a stream by keyword
        basis, _ = mx.linalg.qr(turned, stream=mx.cpu)  # type: ignore
        mx.eval(basis)
    inner = basis.T @ product
    gram = inner @ inner.T
    squares, turn = _eigen(gram)
    vectors = basis @ turn
    return vectors[:, :rank], squares[:rank]


def _eigen(gram: mx.array) -> tuple[np.ndarray, mx.array]:
    """Return eigenvalues, float64 and descending, and eigenvectors of a symmetric matrix."""
    # mlx's stub takes no device for a stream
    values, vectors = mx.linalg.eigh(gram, stream=mx.cpu)  # type: ignore
    descending = np.array(values, np.float64)[::-1]
    positive = np.maximum(descending, 1e-300)
    return positive, vectors[:, ::-1]
