"""One optimizer step: the sums over a step's batches → new parameters and new state. Everything stays lazy.

Gradients are divided by all tokens of the step, so rows of different lengths weigh as they should. Knows no model.
"""

from __future__ import annotations

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
    """

    parameters: Arrays
    state: Arrays
    loss: mx.array
    grad_norm: mx.array


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

    def __call__(self, parameters: Arrays, state: Arrays, sums: Sums, learning_rate: mx.array) -> Updated:
        """Compute lazily.

        Args:
            parameters: trainable arrays by path.
            state: the optimizer's arrays by path.
            sums: over all batches of the step.
            learning_rate: for this step, float32.
        """
        count = mx.maximum(sums.count, 1)
        mean = {path: grad / count.astype(grad.dtype) for path, grad in sums.grads.items()}
        squares = [mx.square(grad.astype(mx.float32)).sum() for grad in mean.values()]
        norm = mx.sqrt(mx.stack(squares).sum()) if squares else mx.array(0.0)
        if self._most:
            factor = mx.minimum(self._most / mx.maximum(norm, 1e-12), 1)
            mean = {path: grad * factor.astype(grad.dtype) for path, grad in mean.items()}
        self._optimizer.state = tree_unflatten([*{**state, "learning_rate": learning_rate}.items()])
        pairs = self._optimizer.apply_gradients(tree_unflatten(list(mean.items())), tree_unflatten(list(parameters.items())))
        return Updated(dict(tree_flatten(pairs)), dict(tree_flatten(self._optimizer.state)), sums.loss / count, norm)
