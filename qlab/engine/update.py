"""One optimizer step: the sums over a step's batches → new parameters and new state, compiled. Everything stays lazy.

Gradients are divided by all tokens of the step, so rows of different lengths weigh as they should. Hundreds of small arrays
are updated; one by one their operations took as long as the gradients of a 1B model (docs/log.md). Knows no model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from qlab.core.training import TrainConfig
from qlab.engine.step import Arrays, Sums


class Updated(NamedTuple):
    """What follows from a step.

    Attributes:
        parameters: new trainable arrays by path.
        state: new arrays of the optimizer by path.
        loss: in nats per target, float32; 0 without any target.
        grad_norm: global norm of the mean gradient before it was clipped, float32.
        finite: whether loss, norm and every new parameter are numbers. What comes of numbers is one, but for float16, which
            ends at 65504: only there the parameters themselves are looked at.
    """

    parameters: Arrays
    state: Arrays
    loss: mx.array
    grad_norm: mx.array
    finite: mx.array


class Update:
    """An optimizer as a function.

    Args:
        config: the run.
        parameters: trainable arrays by path.
    """

    def __init__(self, config: TrainConfig, parameters: Arrays) -> None:
        self._most = config.max_grad_norm
        self._optimizer = config.kind.make(config.learning_rate, config.weight_decay)
        self._optimizer.init(tree_unflatten(list(parameters.items())))
        self.state: Arrays = dict(tree_flatten(self._optimizer.state))
        self._compiled = mx.compile(self._apply)

    def __call__(self, parameters: Arrays, state: Arrays, sums: Sums, learning_rate: mx.array) -> Updated:
        """Compute lazily.

        Args:
            parameters: trainable arrays by path.
            state: the optimizer's arrays by path.
            sums: over all batches of the step.
            learning_rate: for this step, float32.
        """
        return Updated(*self._compiled(parameters, state, sums.grads, sums.loss, sums.count, learning_rate))

    def _apply(
        self, parameters: Arrays, state: Arrays, grads: Arrays, loss: mx.array, count: mx.array, learning_rate: mx.array
    ) -> tuple[Arrays, Arrays, mx.array, mx.array, mx.array]:
        share = 1 / mx.maximum(count, 1)
        norm = mx.sqrt(_total(mx.square(grad.astype(mx.float32)) for grad in grads.values())) * share
        factor = share * mx.minimum(self._most / mx.maximum(norm, 1e-12), 1) if self._most else share
        mean = {path: (grad.astype(mx.float32) * factor).astype(parameters[path].dtype) for path, grad in grads.items()}
        self._optimizer.state = tree_unflatten([*{**state, "learning_rate": learning_rate}.items()])
        pairs = self._optimizer.apply_gradients(tree_unflatten(list(mean.items())), tree_unflatten(list(parameters.items())))
        new, after = dict(tree_flatten(pairs)), dict(tree_flatten(self._optimizer.state))
        self._optimizer.state = {}  # what it holds here are no numbers
        loss = loss * share
        narrow = (array for array in new.values() if array.dtype == mx.float16)
        return new, after, loss, norm, mx.isfinite(loss + norm + _total(narrow))


def _total(arrays: Iterable[mx.array]) -> mx.array:
    """Sum of all numbers, float32; additions are fused where stacking would copy. Not finite if any number is not."""
    return sum((array.astype(mx.float32).sum() for array in arrays), mx.array(0.0))
