"""One optimizer step: the sums over a step's batches → new parameters and new state, compiled.

Everything stays lazy.

Gradients are divided by all tokens of the step, so rows of different lengths weigh as they should.
An adapter is hundreds of small arrays, so whatever is done number by number is done to all of them
as one vector. Knows no model.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from qlab.core.config.train import TrainConfig
from qlab.engine.step.protocol import Arrays, LossAndGradients
from qlab.engine.step.vectors import FlatLayout, FlatViews, stable_sum


class Updated(NamedTuple):
    """What follows from a step.

    Attributes:
        parameters: new trainable arrays by path.
        state: new arrays of the optimizer, by the names of ``Update.state``.
        loss: in nats per target, float32; 0 without any target.
        grad_norm: global norm of the mean gradient before it was clipped, float32.
        finite: whether loss, norm and every new parameter are numbers. What comes of numbers is
            one, but for float16, which ends at 65504: only there the parameters themselves are
            looked at.
    """

    parameters: Arrays
    state: Arrays
    loss: mx.array
    grad_norm: mx.array
    finite: mx.array


class FlatGradients(NamedTuple):
    """A step's sums as the update takes them.

    Attributes:
        grads: as parameters are kept, in the dtype in which they came.
        norm: global norm of them, float32.
        loss: as in ``LossAndGradients``.
        count: as in ``LossAndGradients``.
    """

    grads: Arrays
    norm: mx.array
    loss: mx.array
    count: mx.array


class Update:
    """An optimizer as a function.

    Args:
        config: the run.
        parameters: trainable arrays by path.
    """

    def __init__(self, config: TrainConfig, parameters: Arrays) -> None:
        self._most = config.max_grad_norm
        self._whole = config.optimizer_kind.elementwise
        self._layout = FlatLayout(parameters)
        self._optimizer = config.optimizer_kind.make(config.learning_rate, config.weight_decay)
        self._numbers = dict(self._optimizer.state)
        self._shapes = {
            name: (array.shape, array.dtype) for name, array in self.kept(parameters).items()
        }
        # what it keeps for each parameter; the rest is one number for all
        self._moments = sorted(
            {moment for _, dot, moment in (name.partition(".") for name in self.state) if dot}
        )
        self._gather = mx.compile(self._join)
        self._compiled = mx.compile(self._apply)

    @property
    def state(self) -> Arrays:
        """The optimizer's arrays at first, lazy and made anew each time.

        Nobody holds them for a whole run.

        Where it takes each number by itself they are as long as all parameters of a dtype, and
        named for that instead of for a path.
        """
        self._optimizer.state = dict(self._numbers)
        self._optimizer.init(
            tree_unflatten([(name, mx.zeros(*like)) for name, like in self._shapes.items()])
        )
        made = dict(tree_flatten(self._optimizer.state))
        self._optimizer.state = {}
        return made

    def gather(self, sums: LossAndGradients) -> FlatGradients:
        """Join the gradients, lazily.

        Who computes this, and lets go of the sums, has neither them nor squares in memory while the
        update makes new arrays.

        Args:
            sums: over all batches of the step; its gradients may be as ``kept`` returns them.
        """
        return FlatGradients(*self._gather(sums.grads), sums.loss, sums.count)

    def __call__(
        self,
        parameters: Arrays,
        state: Arrays,
        sums: LossAndGradients | FlatGradients,
        learning_rate: mx.array,
    ) -> Updated:
        """Compute lazily.

        Args:
            parameters: trainable arrays by path. Those that ``by_path`` made, as of the step
                before, are not copied.
            state: the optimizer's arrays.
            sums: over all batches of the step.
            learning_rate: for this step, float32.
        """
        gathered = sums if isinstance(sums, FlatGradients) else self.gather(sums)
        kept, *rest = self._compiled(self.kept(parameters), state, gathered, learning_rate)
        return Updated(self.by_path(kept), *rest)

    def kept(self, parameters: Arrays) -> Arrays:
        """Return parameters, or their gradients, as the optimizer takes them.

        In vectors, if it takes each number by itself.
        """
        return self._layout.vectors(parameters) if self._whole else parameters

    def by_path(self, kept: Arrays) -> Arrays:
        """Return parameters by path that still know what ``kept`` makes of them."""
        return FlatViews(self._layout.views(kept), self._layout, kept) if self._whole else kept

    def state_by_path(self, state: Arrays) -> Arrays:
        """Return a state as it is written: with arrays for every parameter."""
        if not self._whole:
            return state
        made = {name: array for name, array in state.items() if "." not in name}
        for moment in self._moments:
            views = self._layout.views(
                {name: state[f"{name}.{moment}"] for name in self._layout.dtypes}
            )
            made |= {f"{path}.{moment}": array for path, array in views.items()}
        return made

    def state_joined(self, arrays: Arrays) -> Arrays:
        """Return a state that was written, as ``__call__`` takes it."""
        if not self._whole:
            return {name: arrays[name] for name in self.state}
        names = self.state
        made = {name: array for name, array in arrays.items() if name in names}
        for moment in self._moments:
            vectors = self._layout.vectors(
                {path: arrays[f"{path}.{moment}"] for path in self._layout.paths}
            )
            made |= {f"{name}.{moment}": vector for name, vector in vectors.items()}
        return {name: made[name] for name in names}

    def _join(self, grads: Arrays) -> tuple[Arrays, mx.array]:
        grads = self.kept(grads)
        if self._whole:
            squares = [stable_sum(vector, mx.square) for vector in grads.values()]
        else:
            squares = [mx.square(grad.astype(mx.float32)).sum() for grad in grads.values()]
        return grads, mx.sqrt(sum(squares, mx.array(0.0)))

    def _apply(
        self, parameters: Arrays, state: Arrays, gathered: FlatGradients, learning_rate: mx.array
    ) -> tuple[Arrays, Arrays, mx.array, mx.array, mx.array]:
        grads, norm, loss, count = gathered
        share = 1 / mx.maximum(count, 1)
        norm = norm * share
        loss = loss * share
        factor = (
            share * mx.minimum(self._most / mx.maximum(norm, 1e-12), 1) if self._most else share
        )
        mean = {
            name: (grad.astype(mx.float32) * factor).astype(parameters[name].dtype)
            for name, grad in grads.items()
        }
        self._optimizer.state = tree_unflatten([*{**state, "learning_rate": learning_rate}.items()])
        pairs = self._optimizer.apply_gradients(
            tree_unflatten(list(mean.items())), tree_unflatten(list(parameters.items()))
        )
        new = dict(tree_flatten(pairs))
        after = dict(tree_flatten(self._optimizer.state))
        self._optimizer.state = {}  # what it holds here are no numbers
        narrow = [
            stable_sum(array.reshape(-1)) for array in new.values() if array.dtype == mx.float16
        ]
        return new, after, loss, norm, mx.isfinite(sum(narrow, loss + norm))
