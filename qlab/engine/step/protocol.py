"""What goes into a training step and what comes out; the interface of loop and steps.

The loop (``engine/train/loop.py``) makes a ``StepBatch`` and calls a ``TrainStep``, which
``make_step`` chose; neither side knows more of the other than what stands here.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn

Arrays = dict[str, mx.array]  # by path, such as ``model.layers.0.self_attn.q_proj.lora_a``


class StepBatch(NamedTuple):
    """One batch, as a training step takes it.

    Attributes:
        tokens: ``(batch, length)`` integers.
        mask: ``(batch, length)``, 1 where a token is a target; the first of a row never is.
        key: random key for dropout; the same key drops the same inputs. Needed if there is dropout.
        segments: ``(batch, length)`` integers: 1, 2, … for the packed rows in a row, 0 for padding;
            None if rows are not packed.
    """

    tokens: mx.array
    mask: mx.array
    key: mx.array | None = None
    segments: mx.array | None = None


class LossAndGradients(NamedTuple):
    """Loss and gradients of one batch, or the sums of several; not yet divided by the targets.

    Attributes:
        loss: summed over the targets, in nats, float32 ``()``.
        grads: gradients of that sum by path, in the dtype of the products that gave them.
        count: number of targets, float32 ``()``.
    """

    loss: mx.array
    grads: Arrays
    count: mx.array

    def in_dtypes_of(self, parameters: Arrays) -> LossAndGradients:
        """Return the same with each gradient in the dtype of its parameter, to be summed in it."""
        grads = {}
        for path, grad in self.grads.items():
            grads[path] = grad.astype(parameters[path].dtype)
        return self._replace(grads=grads)

    def plus(self, other: LossAndGradients) -> LossAndGradients:
        """Add another batch."""
        loss = self.loss + other.loss
        grads = {}
        for path, grad in self.grads.items():
            grads[path] = grad + other.grads[path]
        return LossAndGradients(loss, grads, self.count + other.count)


class TrainStep(Protocol):
    """A way to compute loss and gradients of one batch; ``make_step`` returns one.

    Example:
        >>> step = make_step(attached_module, config)
        >>> result = step(step.parameters, StepBatch(tokens, mask))
        >>> result.loss / result.count  # nats/token
    """

    @property
    def module(self) -> nn.Module:
        """The model with its adapters, as ``attach`` returned it."""
        ...

    @property
    def parameters(self) -> Arrays:
        """The trainable arrays as they were at first, by path."""
        ...

    @property
    def how(self) -> str:
        """``whole`` and ``checkpointed`` are whole-graph steps, ``stepped`` is a blockwise step."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """How the step is computed and why, one sentence each."""
        ...

    @property
    def traces(self) -> int:
        """Functions compiled so far."""
        ...

    def __call__(self, parameters: Arrays, batch: StepBatch) -> LossAndGradients:
        """Return loss and gradients of a batch.

        Args:
            parameters: trainable arrays by path, to be used instead of ``self.parameters``.
            batch: what to compute on.

        Raises:
            ValueError: there is dropout, and the batch has no key.
        """
        ...
