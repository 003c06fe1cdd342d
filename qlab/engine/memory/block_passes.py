"""The passes of one block of a blockwise step, as functions that can be read.

``BlockwiseGraph`` reads them and adds them to its graph. They mirror ``BlockProgram`` of
``engine/step/program.py``. Runs on the MLX thread.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from qlab.engine.memory.graph_pieces import Function, Outputs, Placed
from qlab.engine.memory.split_model import SplitModel
from qlab.engine.step.block import array_places, half_step_parameters
from qlab.engine.step.patches import CallSites, patched


class BlockCall(NamedTuple):
    """What a block is given besides the hidden state.

    Attributes:
        form: its positional and keyword arguments, a lazy array in the place of each array.
        arrays: the arrays, in the order in which ``form`` has them.
    """

    form: Any
    arrays: list[Placed]

    @property
    def form_of_arrays(self) -> Hashable:
        """Equal for calls that make the same graph."""
        return tuple((array.like.shape, array.like.dtype) for array in self.arrays)

    def arguments(self, arrays: Sequence[mx.array]) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments with these arrays."""
        left = iter(arrays)

        def fill(leaf: Any) -> Any:
            if _is_array(leaf):
                return next(left)
            return leaf

        args, kwargs = tree_map(fill, self.form)
        return args, kwargs


class BlockPasses:
    """One block: its arrays, and its passes as functions of them.

    Args:
        module: the block.
        path: of the block, such as ``model.layers.0``.
        model: the model that it belongs to.

    Attributes:
        trained_paths: paths of its trained arrays, in the order in which gradients come.
        half_step: those whose gradients are there when half of the backward pass is done.
    """

    def __init__(self, module: nn.Module, path: str, model: SplitModel) -> None:
        self._module = module
        self._model = model
        parameters = dict(tree_flatten(module.parameters()))
        # the order of the step's ``Functional``, in which its results are evaluated
        self._names = [name for name, *_ in array_places(module) if name in parameters]
        self._paths = [f"{path}.{name}" for name in self._names]
        self._trained: list[int] = []  # places among the names
        self.trained_paths: list[str] = []
        for n, array_path in enumerate(self._paths):
            if array_path in model.trained:
                self._trained.append(n)
                self.trained_paths.append(array_path)
        self.half_step = half_step_parameters(module, path, self.trained_paths)

    @property
    def placed(self) -> list[Placed]:
        """Its arrays."""
        return [self._model.placed[path] for path in self._paths]

    @property
    def form(self) -> Hashable:
        """Equal for blocks that make the same graph."""
        arrays = []
        pairs = zip(self._names, self.placed, strict=True)
        for name, placed in pairs:
            like = placed.like
            arrays.append((name, like.shape, like.dtype))
        return type(self._module), tuple(arrays), tuple(self._trained)

    def forward(self, call: BlockCall, call_sites: CallSites) -> Function:
        """Return the forward pass: ``(x, *arrays, *other arguments)`` → output.

        x and output are ``(batch, length − 1, width)``.
        """

        def run(x: mx.array, *arrays: mx.array) -> Outputs:
            weights, others = self._split(arrays)
            with patched(call_sites, forward=True):
                return [self._apply(call, x, weights, others)]

        return run

    def backward(self, call: BlockCall, call_sites: CallSites) -> Function:
        """Return the backward pass: ``(x, slope, *arrays, *other arguments)`` → gradients.

        The output is computed again from the block's input x. Gradients are those by x and by the
        block's trained arrays.
        """

        def run(x: mx.array, slope: mx.array, *arrays: mx.array) -> Outputs:
            weights, others = self._split(arrays)

            def forward(x: mx.array, *trained: mx.array) -> Outputs:
                replaced = list(weights)
                for n, array in zip(self._trained, trained, strict=True):
                    replaced[n] = array
                return [self._apply(call, x, replaced, others)]

            trained = [weights[n] for n in self._trained]
            primals = [x, *trained]
            with patched(call_sites):
                _, grads = mx.vjp(forward, primals, [slope])
            return grads

        return run

    def restore(self) -> None:
        """Put lazy arrays back in the place of those that were read."""
        lazy = [placed.like for placed in self.placed]
        self._put(lazy)

    def _split(self, arrays: Sequence[mx.array]) -> tuple[Outputs, Outputs]:
        """Part the block's arrays from its other arguments."""
        count = len(self._names)
        weights = list(arrays[:count])
        others = list(arrays[count:])
        return weights, others

    def _apply(self, call: BlockCall, x: mx.array, weights: Outputs, others: Outputs) -> mx.array:
        args, kwargs = call.arguments(others)
        self._put(weights)
        return self._module(x, *args, **kwargs)

    def _put(self, arrays: Sequence[mx.array]) -> None:
        pairs = list(zip(self._names, arrays, strict=True))
        self._module.update(tree_unflatten(pairs))


def arrays_in(tree: Any) -> Outputs:
    """Arrays in a tree of arguments."""
    leaves: Any = tree_flatten(tree)  # the stub allows a dict, which is another mode
    return [leaf for _, leaf in leaves if _is_array(leaf)]


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, mx.array)


def lazy_like(leaf: Any) -> Any:
    """A lazy array like an array; anything else as it is."""
    if _is_array(leaf):
        return mx.zeros(leaf.shape, leaf.dtype)
    return leaf
