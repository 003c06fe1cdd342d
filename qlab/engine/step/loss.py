"""The loss of logits with its gradient, and a batch as a model reads it. Everything stays lazy.

Both steps use it; it knows no model.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from qlab.engine.step.protocol import StepBatch
from qlab.ops.sums import cross_entropy, logsumexp


class ShiftedBatch(NamedTuple):
    """A batch as a model reads it: inputs and the tokens that follow them.

    ``length`` is one less than that of the ``StepBatch``.

    Attributes:
        inputs: ``(batch, length)`` tokens.
        targets: ``(batch, length)``, the token that follows each input.
        weights: ``(batch, length)`` float32, 1 where the target counts and 0 elsewhere.
        segments: ``(batch, length)``, number of the packed row that an input belongs to, or None.
    """

    inputs: mx.array
    targets: mx.array
    weights: mx.array
    segments: mx.array | None


def shifted(batch: StepBatch) -> ShiftedBatch:
    """Return a batch as a model reads it; the first token of a row, packed or not, is no target."""
    inputs = batch.tokens[:, :-1]
    targets = batch.tokens[:, 1:]
    weights = batch.mask[:, 1:].astype(mx.float32)
    if batch.segments is None:
        return ShiftedBatch(inputs, targets, weights, None)
    same_row = batch.segments[:, 1:] == batch.segments[:, :-1]
    return ShiftedBatch(inputs, targets, weights * same_row, batch.segments[:, :-1])


def nats(logits: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
    """Return the sum of the cross-entropy in nats over the targets, float32 ``()``.

    Args:
        logits: ``(batch, length, vocabulary)``.
        targets: ``(batch, length)``.
        weights: ``(batch, length)``.
    """
    losses = cross_entropy(logits, targets)
    return (losses * weights).sum()


def nats_and_slope(
    logits: mx.array, targets: mx.array, weights: mx.array
) -> tuple[mx.array, mx.array]:
    """Return the sum of the cross-entropy in nats, and its gradient by the logits.

    The gradient by the logits is softmax(logits), less one at the target, times the weight. It is
    computed directly, because that needs one array of the size of the logits where differentiation
    keeps four. On a GPU MLX has
    a kernel for the loss and one for its gradient, which read the logits as they are and compute in
    float32.

    Args:
        logits: ``(batch, length, vocabulary)``.
        targets: ``(batch, length)``.
        weights: ``(batch, length)`` float32.

    Returns:
        Loss, float32 ``()``; gradient, of the logits' shape and dtype.
    """
    if mx.default_device() == mx.gpu:

        def kernel(logits: mx.array) -> mx.array:
            return mx.fast.cross_entropy(logits, targets)

        (losses,), (slope,) = mx.vjp(kernel, [logits], [weights])
        return (losses * weights).sum(), slope
    full = logits.astype(mx.float32)
    log_sum = logsumexp(full, keepdims=True)  # (batch, length, 1)
    target_logit = mx.take_along_axis(full, targets[..., None], -1)
    losses = (log_sum - target_logit)[..., 0]  # (batch, length)
    total = (losses * weights).sum()
    vocabulary = mx.arange(logits.shape[-1])
    is_target = vocabulary == targets[..., None]  # (batch, length, vocabulary)
    probabilities = mx.exp(full - log_sum)
    slope = mx.where(is_target, probabilities - 1, probabilities)
    weighted = slope * weights[..., None]
    return total, weighted.astype(logits.dtype)
