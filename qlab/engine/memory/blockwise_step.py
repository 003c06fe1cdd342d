"""Reads the graph of a blockwise step without computing it; ``Forecast`` simulates its memory.

The step is ``engine/step/blockwise.py``. It cannot be exported whole, because it hands blocks over
to the device while it runs; so this file follows it line by line and adds, in the same order, the
graph of everything that the step computes. What mirrors what:

| | here | ``BlockwiseStep`` |
|---|---|---|
| | ``SplitModel(…)`` | ``__init__``: dense weights live through a block; what is trained outside |
| 1 | ``_before`` | ``self._stack.before`` |
| 2 | ``_cast_factors`` | ``_cast_factors``: factors cast once, not in every pass |
| 3 | ``_forward``, ``BlockPasses.forward`` | ``_forward``, ``BlockProgram.forward`` |
| 4 | ``LossGraph`` (``blockwise_loss.py``) | ``_loss``, ``Head`` |
| 5 | ``_backward``, ``BlockPasses.backward`` | blocks in reverse, ``BlockProgram.backward`` |
| 6 | ``_embedding_gradients`` | the end of ``_compute``, where what is trained embeds |
| | ``hand_over(…, window)`` | ``flight.add(window, …)`` |
| | ``add_update`` (``update_graph.py``) | what the training loop does with the gradients |

The numbers are those of the table in ``engine/step/whole.py``.
A change there needs the same change here; ``tests/engine/memory/test_whole_step.py`` compares the
peak of both. Runs on the MLX thread. Knows no budget.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from qlab.core.config.train import TrainConfig
from qlab.core.graph.graph import Graph
from qlab.engine.memory.block_passes import BlockCall, BlockPasses, arrays_in, lazy_like
from qlab.engine.memory.blockwise_loss import LossGraph
from qlab.engine.memory.graph_pieces import Function, Outputs, PieceGraph, Placed
from qlab.engine.memory.split_model import SplitModel
from qlab.engine.memory.update_graph import SumIds, add_update
from qlab.engine.step.block import array_places, castable_parameters
from qlab.engine.step.blockwise import half_step_window
from qlab.engine.step.patches import call_sites


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
        self._call_sites = call_sites(module)
        self._blocks = []
        stack = self._model.stack
        for i, module_of_block in enumerate(stack.blocks):
            path = f"{stack.path}.{i}"
            block = BlockPasses(module_of_block, path, self._model)
            self._blocks.append(block)

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
        lazy_tokens = mx.zeros(shape, mx.int32)
        tokens = pieces.add_input(lazy_tokens, "batch")
        parameters = [model.placed[path].id for path in model.trained]

        x, calls = self._before(tokens)  # 1
        self._cast_factors(x.like.dtype)  # 2
        inputs, x = self._forward(x, calls)  # 3
        loss_graph = LossGraph(model, pieces, tokens, x, self._window)  # 4
        loss = loss_graph.add()
        grads = dict(zip(model.trained_outside, loss.grads, strict=True))
        cotangent, block_grads = self._backward(loss.cotangent, inputs, calls)  # 5
        grads |= block_grads
        if model.trains_embedding:  # 6
            grads |= self._embedding_gradients(tokens, cotangent, grads)

        number = mx.array(0.0)
        count = pieces.add_input(number, "batch")
        ordered = [grads[path].id for path in model.trained]
        sums = SumIds(ordered, loss.total.id, count.id)
        graph = pieces.graph
        add_update(graph, self._train, model.trained, parameters, sums)
        graph.hand_over(graph.outputs, self._window)
        return graph

    # --- the passes -------------------------------------------------------------------------------

    def _before(self, tokens: Placed) -> tuple[Placed, list[BlockCall]]:
        """Add what comes before the blocks.

        Returns:
            The first block's input ``(batch, length − 1, width)``, and what each block is given
            besides.
        """
        model = self._model
        forms: list[Any] = []  # of every block's arguments, known once the piece was read

        def run(tokens: mx.array, *outside: mx.array) -> Outputs:
            model.put(model.outside, outside)
            inputs = tokens[:, :-1]
            segments = model.segments(tokens)
            x, calls = model.stack.before(inputs, segments)
            outputs = [x]
            forms.clear()
            for args, kwargs in calls:
                tree = [list(args), kwargs]
                forms.append(tree_map(lazy_like, tree))
                outputs += arrays_in(tree)
            return outputs

        inputs = [tokens, *model.outside_arrays]
        x, *others = self._pieces.add("before", run, inputs)
        left = iter(others)
        calls = []
        for form in forms:
            arrays = [next(left) for _ in arrays_in(form)]
            calls.append(BlockCall(form, arrays))
        return x, calls

    def _cast_factors(self, dtype: mx.Dtype) -> None:
        """Go on with the blocks' trained factors in the dtype in which products take them."""
        model = self._model
        places = array_places(model.module)
        prefix = f"{model.stack.path}."
        castable = castable_parameters(places, prefix, model.trained)

        def as_cast(array: mx.array) -> Outputs:
            return [array.astype(dtype)]

        for path in castable.get(dtype, ()):
            if model.trained[path].dtype == dtype:
                continue
            key = (path, dtype)
            factor = model.placed[path]
            (cast,) = self._pieces.add(key, as_cast, [factor])
            model.placed[path] = cast
            model.put([path], [cast.like])

    def _forward(self, x: Placed, calls: list[BlockCall]) -> tuple[list[Placed], Placed]:
        """Add the blocks' forward passes.

        Returns:
            The inputs of all blocks that a gradient reaches, and the output of the last block.
        """
        first = self._first_reached()
        inputs = []
        pairs = zip(self._blocks, calls, strict=True)
        for i, (block, call) in enumerate(pairs):
            if i >= first:
                inputs.append(x)
            function = block.forward(call, self._call_sites)
            key = ("forward", block.form, call.form_of_arrays)
            (x,) = self._add_block(key, function, [x], block, call)
            self._pieces.hand_over([x], self._window)
        return inputs, x

    def _backward(
        self, cotangent: Placed, inputs: list[Placed], calls: list[BlockCall]
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
        reached = range(self._first_reached(), len(self._blocks))
        for i in reversed(reached):
            block = self._blocks[i]
            call = calls[i]
            function = block.backward(call, self._call_sites)
            key = ("backward", block.form, call.form_of_arrays)
            x = inputs.pop()
            outputs = self._add_block(key, function, [x, cotangent], block, call)
            cotangent, *trained_grads = outputs
            block_grads = dict(zip(block.trained_paths, trained_grads, strict=True))
            grads |= block_grads
            half = [block_grads.pop(path) for path in block.half_step]
            if half:
                window = half_step_window(self._window)
                self._pieces.hand_over(half, window)
            whole = [cotangent, *block_grads.values()]
            self._pieces.hand_over(whole, self._window)
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
        block: BlockPasses,
        call: BlockCall,
    ) -> list[Placed]:
        """Add a pass through a block, of its inputs, its arrays and its other arguments."""
        all_inputs = [*inputs, *block.placed, *call.arrays]
        try:
            return self._pieces.add_compiled(key, function, all_inputs)
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
            count = len(paths)
            sums = arrays[:count]
            others = arrays[count:]
            outside = dict(zip(model.outside, others, strict=True))

            def before(*trained: mx.array) -> Outputs:
                changed = dict(zip(paths, trained, strict=True))
                arrays = outside | changed
                model.put(arrays, list(arrays.values()))
                inputs = tokens[:, :-1]
                segments = model.segments(tokens)
                x, _ = model.stack.before(inputs, segments)
                return [x]

            primals = [outside[path] for path in paths]
            _, more = mx.vjp(before, primals, [slope])
            pairs = zip(sums, more, strict=True)
            return [old + new for old, new in pairs]

        sums = [grads[path] for path in paths]
        inputs = [tokens, cotangent, *sums, *model.outside_arrays]
        summed = self._pieces.add("into", run, inputs)
        return dict(zip(paths, summed, strict=True))
