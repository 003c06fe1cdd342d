"""Reads the graph of a blockwise step without computing it; ``Forecast`` simulates its memory.

The step is ``engine/step/blockwise.py``. It cannot be exported whole, because it hands blocks over
to the device while it runs; so this file follows it line by line and adds, in the same order, the
graph of everything that the step computes. What mirrors what:

| | here | ``BlockwiseStep`` |
|---|---|---|
| | ``SplitModel(…)`` | ``__init__``: dense weights live through a block; what is trained outside |
| 1 | ``_before`` | ``self._stack.before`` |
| 2 | ``_cast_factors`` | ``_cast_factors``: factors cast once, not in every pass |
| 3 | ``_forward``, ``_Block.forward`` | ``_forward``, ``BlockProgram.forward`` |
| 4 | ``LossGraph`` (``blockwise_loss.py``) | ``_loss``, ``Head`` |
| 5 | ``_backward``, ``_Block.backward`` | blocks in reverse, ``BlockProgram.backward`` |
| 6 | ``_embedding_gradients`` | the end of ``_compute``, where what is trained embeds |
| | ``hand_over(…, window)`` | ``flight.add(window, …)`` |
| | ``add_update`` (``update_graph.py``) | what the training loop does with the gradients |

The numbers are those of the table in ``engine/step/whole.py``.
A change there needs the same change here; ``tests/engine/memory/test_whole_step.py`` compares the
peak of both. Runs on the MLX thread. Knows no budget.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from qlab.core.config.train import TrainConfig
from qlab.core.graph.graph import Graph
from qlab.engine.memory.blockwise_loss import LossGraph
from qlab.engine.memory.graph_pieces import Function, Outputs, PieceGraph, Placed
from qlab.engine.memory.split_model import SplitModel
from qlab.engine.memory.update_graph import SumIds, add_update
from qlab.engine.step.block import array_places, castable_parameters, half_step_parameters
from qlab.engine.step.blockwise import half_step_window
from qlab.engine.step.patches import patched, users


class BlockwiseGraph:
    """The graph of one optimizer step that is taken a block at a time.

    The pieces of the step (what comes before the blocks, a block's forward pass, its backward
    pass, a chunk of the loss, the update) are read once for each kind and copied into one graph as
    often as the step runs them. Between them the graph is cut into rounds, as the step hands
    arrays over: they say how far the host runs ahead of the device, and so what is in memory at
    once.

    Args:
        module: what ``attach`` returned, its arrays lazy or not; must have no other user.
        train: the run's settings; the batch is the largest that they allow.
        window: blocks in flight at once.

    Raises:
        UnsupportedError: the model cannot be taken apart into blocks.
    """

    def __init__(self, module: nn.Module, train: TrainConfig, window: int) -> None:
        self._train = train
        self._window = window
        self._pieces = PieceGraph()
        self._model = SplitModel(module, train, self._pieces)
        self._users = users(module)
        self._blocks = [
            _Block(block, f"{self._model.stack.path}.{i}", self._model)
            for i, block in enumerate(self._model.stack.blocks)
        ]

    def read(self) -> Graph:
        """Return the graph of the whole step; the module is left as it was.

        Raises:
            UnsupportedError: a piece of the step cannot be read.
        """
        try:
            return self._read()
        finally:
            self._model.restore()

    def _read(self) -> Graph:
        model = self._model
        pieces = self._pieces
        shape = (self._train.batch_size, self._train.max_seq_length)
        tokens = pieces.add_input(mx.zeros(shape, mx.int32), "batch")
        parameters = [model.placed[path].id for path in model.trained]

        x, calls = self._before(tokens)  # 1
        self._cast_factors(x.like.dtype)  # 2
        inputs, x = self._forward(x, calls)  # 3
        loss = LossGraph(model, pieces, tokens, x, self._window).add()  # 4
        grads = dict(zip(model.trained_outside, loss.grads, strict=True))
        cotangent, block_grads = self._backward(loss.cotangent, inputs, calls)  # 5
        grads |= block_grads
        if model.trains_embedding:  # 6
            grads |= self._embedding_gradients(tokens, cotangent, grads)

        count = pieces.add_input(mx.array(0.0), "batch")
        ordered = [grads[path].id for path in model.trained]
        sums = SumIds(ordered, loss.total.id, count.id)
        graph = pieces.graph
        add_update(graph, self._train, model.trained, parameters, sums)
        graph.hand_over(graph.outputs, self._window)
        return graph

    # --- the passes -------------------------------------------------------------------------------

    def _before(self, tokens: Placed) -> tuple[Placed, list[_Call]]:
        """Add what comes before the blocks.

        Returns:
            The first block's input ``(batch, length − 1, width)``, and what each block is given
            besides.
        """
        model = self._model
        forms: list[Any] = []  # of every block's arguments, known once the piece was read

        def run(tokens: mx.array, *outside: mx.array) -> Outputs:
            model.put(model.outside, outside)
            x, calls = model.stack.before(tokens[:, :-1], model.segments(tokens))
            trees = [[list(args), kwargs] for args, kwargs in calls]
            forms[:] = [tree_map(_lazy_like, tree) for tree in trees]
            return [x, *(array for tree in trees for array in _arrays_in(tree))]

        x, *others = self._pieces.add("before", run, [tokens, *model.outside_arrays])
        left = iter(others)
        calls = []
        for form in forms:
            arrays = [next(left) for _ in _arrays_in(form)]
            calls.append(_Call(form, arrays))
        return x, calls

    def _cast_factors(self, dtype: mx.Dtype) -> None:
        """Go on with the blocks' trained factors in the dtype in which products take them."""
        model = self._model
        places = array_places(model.module)
        castable = castable_parameters(places, f"{model.stack.path}.", model.trained)
        for path in castable.get(dtype, ()):
            if model.trained[path].dtype == dtype:
                continue
            key = (path, dtype)
            factor = model.placed[path]
            (cast,) = self._pieces.add(key, lambda array: [array.astype(dtype)], [factor])
            model.placed[path] = cast
            model.put([path], [cast.like])

    def _forward(self, x: Placed, calls: list[_Call]) -> tuple[list[Placed], Placed]:
        """Add the blocks' forward passes.

        Returns:
            The inputs of all blocks that a gradient reaches, and the output of the last block.
        """
        first = self._first_reached()
        inputs = []
        for i, (block, call) in enumerate(zip(self._blocks, calls, strict=True)):
            if i >= first:
                inputs.append(x)
            function = block.forward(call, self._users)
            key = ("forward", block.form, call.form_of_arrays)
            (x,) = self._add_block(key, function, [x], block, call)
            self._pieces.hand_over([x], self._window)
        return inputs, x

    def _backward(
        self, cotangent: Placed, inputs: list[Placed], calls: list[_Call]
    ) -> tuple[Placed, dict[str, Placed]]:
        """Add the blocks' backward passes, from the last block to the first that is reached.

        Args:
            cotangent: gradient by the last block's output.
            inputs: what ``_forward`` returned.
            calls: what each block is given besides.

        Returns:
            The gradient by the input of the first block that is reached, and the gradients by the
            trained arrays of the blocks, by path.
        """
        grads: dict[str, Placed] = {}
        for i in reversed(range(self._first_reached(), len(self._blocks))):
            block = self._blocks[i]
            call = calls[i]
            function = block.backward(call, self._users)
            key = ("backward", block.form, call.form_of_arrays)
            x = inputs.pop()
            cotangent, *trained_grads = self._add_block(key, function, [x, cotangent], block, call)
            block_grads = dict(zip(block.trained_paths, trained_grads, strict=True))
            grads |= block_grads
            half = [block_grads.pop(path) for path in block.half_step]
            if half:
                self._pieces.hand_over(half, half_step_window(self._window))
            self._pieces.hand_over([cotangent, *block_grads.values()], self._window)
        return cotangent, grads

    def _first_reached(self) -> int:
        """Number of the first block that a gradient reaches."""
        if self._model.trains_embedding:
            return 0
        reached = [i for i, block in enumerate(self._blocks) if block.trained_paths]
        return min(reached, default=len(self._blocks))

    def _add_block(
        self,
        key: Hashable,
        function: Function,
        inputs: list[Placed],
        block: _Block,
        call: _Call,
    ) -> list[Placed]:
        """Add a pass through a block, of its inputs, its arrays and its other arguments."""
        try:
            return self._pieces.add_compiled(key, function, [*inputs, *block.placed, *call.arrays])
        finally:
            block.restore()

    def _embedding_gradients(
        self, tokens: Placed, cotangent: Placed, grads: dict[str, Placed]
    ) -> dict[str, Placed]:
        """Add the gradients by what is trained before the blocks to those of the loss.

        Args:
            tokens: the batch.
            cotangent: gradient by the first block's input.
            grads: gradients so far by path.
        """
        model = self._model
        paths = model.trained_outside

        def run(tokens: mx.array, slope: mx.array, *arrays: mx.array) -> Outputs:
            sums = arrays[: len(paths)]
            outside = dict(zip(model.outside, arrays[len(paths) :], strict=True))

            def before(*trained: mx.array) -> Outputs:
                changed = outside | dict(zip(paths, trained, strict=True))
                model.put(changed, list(changed.values()))
                x, _ = model.stack.before(tokens[:, :-1], model.segments(tokens))
                return [x]

            _, more = mx.vjp(before, [outside[path] for path in paths], [slope])
            return [old + new for old, new in zip(sums, more, strict=True)]

        sums = [grads[path] for path in paths]
        inputs = [tokens, cotangent, *sums, *model.outside_arrays]
        summed = self._pieces.add("into", run, inputs)
        return dict(zip(paths, summed, strict=True))


class _Call(NamedTuple):
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
            return next(left) if _is_array(leaf) else leaf

        args, kwargs = tree_map(fill, self.form)
        return args, kwargs


class _Block:
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
        trained = [n for n, path in enumerate(self._paths) if path in model.trained]
        self._trained = trained
        self.trained_paths = [self._paths[n] for n in trained]
        self.half_step = half_step_parameters(module, path, self.trained_paths)

    @property
    def placed(self) -> list[Placed]:
        """Its arrays."""
        return [self._model.placed[path] for path in self._paths]

    @property
    def form(self) -> Hashable:
        """Equal for blocks that make the same graph."""
        arrays = []
        for name, placed in zip(self._names, self.placed, strict=True):
            arrays.append((name, placed.like.shape, placed.like.dtype))
        return type(self._module), tuple(arrays), tuple(self._trained)

    def forward(self, call: _Call, users: Any) -> Function:
        """Return the forward pass: ``(x, *arrays, *other arguments)`` → output.

        x and output are ``(batch, length − 1, width)``.
        """

        def run(x: mx.array, *arrays: mx.array) -> Outputs:
            weights, others = self._split(arrays)
            with patched(users, forward=True):
                return [self._apply(call, x, weights, others)]

        return run

    def backward(self, call: _Call, users: Any) -> Function:
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

            primals = [x, *(weights[n] for n in self._trained)]
            with patched(users):
                _, grads = mx.vjp(forward, primals, [slope])
            return grads

        return run

    def restore(self) -> None:
        """Put lazy arrays back in the place of those that were read."""
        self._put([placed.like for placed in self.placed])

    def _split(self, arrays: Sequence[mx.array]) -> tuple[Outputs, Outputs]:
        """Part the block's arrays from its other arguments."""
        count = len(self._names)
        return list(arrays[:count]), list(arrays[count:])

    def _apply(self, call: _Call, x: mx.array, weights: Outputs, others: Outputs) -> mx.array:
        args, kwargs = call.arguments(others)
        self._put(weights)
        return self._module(x, *args, **kwargs)

    def _put(self, arrays: Sequence[mx.array]) -> None:
        pairs = list(zip(self._names, arrays, strict=True))
        self._module.update(tree_unflatten(pairs))


def _arrays_in(tree: Any) -> Outputs:
    """Arrays in a tree of arguments."""
    leaves: Any = tree_flatten(tree)  # the stub allows a dict, which is another mode
    return [leaf for _, leaf in leaves if _is_array(leaf)]


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, mx.array)


def _lazy_like(leaf: Any) -> Any:
    return mx.zeros(leaf.shape, leaf.dtype) if _is_array(leaf) else leaf
