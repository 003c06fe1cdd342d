"""One optimizer step: the sums over a step's batches → new parameters and new state, compiled.

The loop calls it after the last batch of a step; everything stays lazy. Gradients are divided by
all targets of the step, so rows of different lengths weigh as they should. An adapter is hundreds
of small arrays, so whatever is done element by element is done to all of them as one vector.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from qlab.core.config.train import TrainConfig
from qlab.engine.step.protocol import Arrays, LossAndGradients
from qlab.engine.step.vectors import FlatLayout, FlatViews
from qlab.ops.sums import stable_sum


class Updated(NamedTuple):
    """Result of a step.

    Attributes:
        parameters: new trainable arrays by path.
        state: new arrays of the optimizer, by the names of ``Update.state``.
        loss: loss in nats/token, float32 ``()``; 0 without any target.
        grad_norm: global norm of the mean gradient before clipping, float32 ``()``.
        finite: whether loss, norm and every new parameter are finite, bool ``()``. Finite loss and
            norm give finite parameters except in float16, which ends at 65504: only float16
            parameters are looked at themselves.
    """

    parameters: Arrays
    state: Arrays
    loss: mx.array
    grad_norm: mx.array
    finite: mx.array


class FlatGradients(NamedTuple):
    """A step's sums as the update takes them.

    Attributes:
        grads: summed gradients, laid out as ``Update.flat`` does, in the dtype in which they came.
        norm: global norm of the summed gradients, float32 ``()``.
        loss: as in ``LossAndGradients``.
        count: as in ``LossAndGradients``.
    """

    grads: Arrays
    norm: mx.array
    loss: mx.array
    count: mx.array


class Update:
    """An optimizer as a function: parameters, state and gradients → new parameters and state.

    Example:
        >>> update = Update(config, parameters)
        >>> state = update.state
        >>> new = update(parameters, state, result, mx.array(1e-4))
        >>> parameters, state = new.parameters, new.state

    Args:
        config: config of the run: optimizer, decay, clipping.
        parameters: trainable arrays by path.
    """

    def __init__(self, config: TrainConfig, parameters: Arrays) -> None:
        self._max_norm = config.max_grad_norm
        self._elementwise = config.optimizer_kind.elementwise
        self._layout = FlatLayout(parameters)
        kind = config.optimizer_kind
        self._optimizer = kind.make(config.learning_rate, config.weight_decay)
        self._scalars = dict(self._optimizer.state)  # step and learning rate
        self._shapes = {}
        for name, array in self.flat(parameters).items():
            self._shapes[name] = (array.shape, array.dtype)
        # names after the last path or dtype, such as ``m``; other state is one number for all
        names = filter(_is_of_parameter, self.state)
        moments = {name.split(".", 1)[1] for name in names}
        self._moments = sorted(moments)
        self._gather = mx.compile(self._flat_with_norm)
        self._compiled = mx.compile(self._apply)

    @property
    def state(self) -> Arrays:
        """The optimizer's initial arrays by name, lazy and made anew each time.

        They are not stored here, or they would stay in memory for the whole run. The arrays of an
        elementwise optimizer are vectors as long as all parameters of a dtype, and named for the
        dtype instead of a path.
        """
        zeros = {}
        for name, (shape, dtype) in self._shapes.items():
            zeros[name] = mx.zeros(shape, dtype)
        self._optimizer.state = dict(self._scalars)
        self._optimizer.init(_tree(zeros))
        return self._take_state()

    def gather(self, sums: LossAndGradients) -> FlatGradients:
        """Lay the gradients out and take their norm, lazily.

        A caller who evaluates the result and drops the sums has neither them nor their squares in
        memory while the update makes new arrays.

        Args:
            sums: sums over all batches of the step; the gradients may be laid out already.
        """
        grads, norm = self._gather(sums.grads)
        return FlatGradients(grads=grads, norm=norm, loss=sums.loss, count=sums.count)

    def __call__(
        self,
        parameters: Arrays,
        state: Arrays,
        sums: LossAndGradients | FlatGradients,
        learning_rate: mx.array,
    ) -> Updated:
        """Compute a step, lazily.

        Args:
            parameters: trainable arrays by path; those of the step before are not copied.
            state: the optimizer's arrays.
            sums: sums over all batches of the step.
            learning_rate: learning rate of this step, float32 ``()``.
        """
        gathered = sums if isinstance(sums, FlatGradients) else self.gather(sums)
        flat = self.flat(parameters)
        # compiled functions return plain tuples
        fields = self._compiled(flat, state, gathered, learning_rate)
        updated = Updated(*fields)
        by_path = self.by_path(updated.parameters)
        return updated._replace(parameters=by_path)

    def flat(self, parameters: Arrays) -> Arrays:
        """Return parameters, or their gradients, as the optimizer takes them.

        An elementwise optimizer takes one vector for each dtype, others take arrays by path.
        """
        return self._layout.vectors(parameters) if self._elementwise else parameters

    def by_path(self, flat: Arrays) -> Arrays:
        """Return parameters by path for which ``flat`` need not copy anything."""
        if not self._elementwise:
            return flat
        views = self._layout.views(flat)
        return FlatViews(views, self._layout, flat)

    def state_by_path(self, state: Arrays) -> Arrays:
        """Return a state as it is written to disk: with arrays for every parameter."""
        if not self._elementwise:
            return state
        stored = {}
        for name, array in state.items():
            if not _is_of_parameter(name):
                stored[name] = array
        for moment in self._moments:
            vectors = _of_moment(state, moment, self._layout.dtypes)
            views = self._layout.views(vectors)
            stored |= _named_for(moment, views)
        return stored

    def state_from_paths(self, stored: Arrays) -> Arrays:
        """Return a state that was written to disk as ``__call__`` takes it."""
        names = list(self.state)
        if not self._elementwise:
            return {name: stored[name] for name in names}
        state = {name: array for name, array in stored.items() if name in names}
        for moment in self._moments:
            arrays = _of_moment(stored, moment, self._layout.paths)
            vectors = self._layout.vectors(arrays)
            state |= _named_for(moment, vectors)
        return {name: state[name] for name in names}

    def _take_state(self) -> Arrays:
        """Return the optimizer's arrays by name, and leave it without any."""
        names_and_arrays = tree_flatten(self._optimizer.state)
        arrays = dict(names_and_arrays)
        self._optimizer.state = {}
        return arrays

    def _flat_with_norm(self, grads: Arrays) -> tuple[Arrays, mx.array]:
        grads = self.flat(grads)
        squares = [stable_sum(grad, mx.square) for grad in grads.values()]
        total = sum(squares, mx.array(0.0))
        return grads, mx.sqrt(total)

    def _apply(
        self, parameters: Arrays, state: Arrays, gathered: FlatGradients, learning_rate: mx.array
    ) -> tuple[Arrays, Arrays, mx.array, mx.array, mx.array]:
        """Return the fields of ``Updated``, with parameters as ``flat`` returns them."""
        grads, norm, loss, count = gathered
        per_target = 1 / mx.maximum(count, 1)
        norm = norm * per_target
        loss = loss * per_target
        factor = per_target
        if self._max_norm:
            clipping = self._max_norm / mx.maximum(norm, 1e-12)
            factor = per_target * mx.minimum(clipping, 1)
        mean = {}
        for name, grad in grads.items():
            scaled = grad.astype(mx.float32) * factor
            mean[name] = scaled.astype(parameters[name].dtype)
        arrays = {**state, "learning_rate": learning_rate}
        self._optimizer.state = _tree(arrays)
        tree = self._optimizer.apply_gradients(_tree(mean), _tree(parameters))
        updated = dict(tree_flatten(tree))
        # here the optimizer holds placeholders of the compilation, which must not stay
        new_state = self._take_state()
        narrow = [array for array in updated.values() if array.dtype == mx.float16]
        sums = [stable_sum(array) for array in narrow]
        total = sum(sums, loss + norm)
        finite = mx.isfinite(total)
        return updated, new_state, loss, norm, finite


def _tree(arrays: Arrays) -> Any:
    """Return arrays by path as MLX's optimizers take them."""
    return tree_unflatten(list(arrays.items()))


def _is_of_parameter(name: str) -> bool:
    """Whether an array of a state belongs to one parameter; else it is one number for all."""
    return "." in name


def _of_moment(state: Arrays, moment: str, owners: Iterable[str]) -> Arrays:
    """Return one moment's arrays by path or dtype."""
    return {owner: state[f"{owner}.{moment}"] for owner in owners}


def _named_for(moment: str, arrays: Arrays) -> Arrays:
    """Return one moment's arrays by their names in a state."""
    return {f"{owner}.{moment}": array for owner, array in arrays.items()}
