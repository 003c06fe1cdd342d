"""What a batch adds up to, and the loss of logits with its slope. Everything stays lazy.

Knows no model.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

Arrays = dict[str, mx.array]


class Sums(NamedTuple):
    """What one batch, or several, add up to.

    Attributes:
        loss: in nats over the targets, float32.
        grads: of that loss by path, in the dtype of the products that gave them.
        count: number of targets, float32.
    """

    loss: mx.array
    grads: Arrays
    count: mx.array

    def like(self, parameters: Arrays) -> Sums:
        """Return the gradients in the dtype of the parameters, to be added up in it."""
        return self._replace(
            grads={path: grad.astype(parameters[path].dtype) for path, grad in self.grads.items()}
        )

    def plus(self, other: Sums) -> Sums:
        """Add another batch."""
        grads = {path: grad + other.grads[path] for path, grad in self.grads.items()}
        return Sums(self.loss + other.loss, grads, self.count + other.count)


class Given(NamedTuple):
    """A batch as a model sees it, one position shorter than its rows.

    Attributes:
        inputs: ``(batch, length)`` tokens.
        targets: ``(batch, length)`` the token that follows each.
        weights: ``(batch, length)`` float32, 1 where the target counts.
        segments: ``(batch, length)`` number of the packed row that a position belongs to, or None.
    """

    inputs: mx.array
    targets: mx.array
    weights: mx.array
    segments: mx.array | None


def given(tokens: mx.array, mask: mx.array, segments: mx.array | None) -> Given:
    """Return a batch as a model sees it; the first token of a row, packed or not, is no target."""
    weights = mask[:, 1:].astype(mx.float32)
    if segments is None:
        return Given(tokens[:, :-1], tokens[:, 1:], weights, None)
    inner = segments[:, 1:] == segments[:, :-1]
    return Given(tokens[:, :-1], tokens[:, 1:], weights * inner, segments[:, :-1])


def nats(logits: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
    """Sum of the cross-entropy in nats over the targets; float32."""
    return (nn.losses.cross_entropy(logits.astype(mx.float32), targets) * weights).sum()


def nats_and_slope(
    logits: mx.array, targets: mx.array, weights: mx.array
) -> tuple[mx.array, mx.array]:
    """Sum of the cross-entropy in nats, and its gradient by the logits.

    Probabilities, less one at the target, weighted.

    Written out, because it needs one array of the size of the logits where differentiation keeps
    four. On a GPU MLX has a kernel for each, which read the logits as they are, and reckon in
    float32.
    """
    if mx.default_device() == mx.gpu:
        (each,), (slope,) = mx.vjp(lambda x: mx.fast.cross_entropy(x, targets), [logits], [weights])
        return (each * weights).sum(), slope
    full = logits.astype(mx.float32)
    log_sum = mx.logsumexp(full, -1, keepdims=True)
    total = ((log_sum - mx.take_along_axis(full, targets[..., None], -1))[..., 0] * weights).sum()
    hit = mx.arange(logits.shape[-1]) == targets[..., None]
    probabilities = mx.exp(full - log_sum)
    return total, (mx.where(hit, probabilities - 1, probabilities) * weights[..., None]).astype(
        logits.dtype
    )
