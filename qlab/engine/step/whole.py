"""The whole-graph step: loss and gradients of a batch as one lazy graph.

Without checkpoints the graph keeps what every block computed until the backward pass. With
checkpoints it keeps the input of each block only, and a block is computed again when its gradient
is due. ``blockwise.py`` does the latter a block at a time. Chosen by ``make_step``.

A step with checkpoints is written in three places, which must change together, because one is a
graph, one runs at once and one only reads what would run:

| | part of the step | ``_checkpointed`` here | ``blockwise.py`` | ``memory/blockwise_step.py`` |
|---|---|---|---|---|
| 1 | what comes before the blocks | ``stack.before`` | ``stack.before`` | ``_before`` |
| 2 | factors cast to x's dtype | left to the products | ``_cast_factors`` | ``_cast_factors`` |
| 3 | forward pass of the blocks | loop over blocks | ``_forward`` | ``_forward`` |
| 4 | loss, gradient by hidden state | ``_loss`` | ``_loss``, ``Head`` | ``LossGraph`` |
| 5 | backward pass, last block first | ``_block_backward`` | ``BlockProgram`` | ``_backward`` |
| 6 | gradients before the blocks | ``_before`` | ``_before`` | ``_embedding_gradients`` |
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from qlab.core.config.train import TrainConfig
from qlab.engine.models.blocks import BlockCall, BlockStack, run
from qlab.engine.step.loss import ShiftedBatch, nats, nats_and_slope, shifted
from qlab.engine.step.patches import call_sites, patched
from qlab.engine.step.protocol import Arrays, LossAndGradients, StepBatch
from qlab.nn.frozen import Frozen


class WholeGraphStep:
    """Loss and gradients of a model as one lazy graph, which is compiled on a CPU.

    A ``TrainStep``.

    Args:
        module: what ``attach`` returned; the step must be its only user.
        config: checkpoints, chunk of the loss.
        note: why it is computed as one graph, if that is not what was asked for.

    Attributes:
        module: the model with its adapters.
        config: the run.
        parameters: trainable arrays by path.
        how: ``whole`` or ``checkpointed``.
        notes: how it is computed and why, in words.
        traces: compiled so far: on a CPU one for each shape, elsewhere none.
        stack: the model's blocks; None if it need not be taken apart.

    Raises:
        UnsupportedError: checkpoints or a chunked loss are wanted, and the model cannot be taken
            apart.
    """

    def __init__(self, module: nn.Module, config: TrainConfig, note: str = "") -> None:
        self.module = module
        self.config = config
        self.how = "checkpointed" if config.grad_checkpoint else "whole"
        self.notes: tuple[str, ...] = (note or f"step: {self.how}, as one graph",)
        self.traces = 0
        apart = config.grad_checkpoint or config.loss_chunk
        self.stack = BlockStack(module) if apart else None
        self.parameters: Arrays = dict(tree_flatten(module.trainable_parameters()))
        self._prefix = f"{self.stack.path}." if self.stack else ""
        self._heads = [
            layer
            for path, layer in module.named_modules()
            if isinstance(layer, Frozen) and not path.startswith(self._prefix)
        ]
        every = dict(tree_flatten(module.parameters()))
        self._dropout_paths = [path for path in every if path.endswith("dropout_key")]
        self._call_sites = call_sites(module)
        self._dropout_keys: Arrays = {}  # of each layer that drops inputs, for the batch at hand
        # compiled, because a CPU computes exponentials fast only so (ops/exponential.py)
        self._compiled = mx.compile(self._trace)

    def __call__(self, parameters: Arrays, batch: StepBatch) -> LossAndGradients:
        """Return loss and gradients of a batch, lazily; see ``TrainStep``."""
        dropout_keys: Arrays = {}
        if self._dropout_paths:
            if batch.key is None:
                raise ValueError("Dropout needs a key, a new one for every batch.")
            keys = mx.random.split(batch.key, len(self._dropout_paths))
            dropout_keys = dict(zip(self._dropout_paths, keys, strict=True))
        compute = self._compiled if mx.default_device() == mx.cpu else self._compute
        # in one order, because another would be compiled anew
        ordered = {path: parameters[path] for path in self.parameters}
        try:
            loss, grads, count = compute(
                ordered, dropout_keys, batch.tokens, batch.mask, batch.segments
            )
        finally:
            self._set(dropout_keys | parameters)
        return LossAndGradients(loss, {path: grads[path] for path in parameters}, count)

    def _trace(self, *arguments: Any) -> tuple[mx.array, Arrays, mx.array]:
        self.traces += 1
        return self._compute(*arguments)

    def _compute(
        self,
        parameters: Arrays,
        dropout_keys: Arrays,
        tokens: mx.array,
        mask: mx.array,
        segments: mx.array | None,
    ) -> tuple[mx.array, Arrays, mx.array]:
        """Return loss, gradients by path and number of targets: what is compiled."""
        self._dropout_keys = dropout_keys
        self._set(dropout_keys)
        batch = shifted(StepBatch(tokens, mask, segments=segments))
        loss_and_grads = self._checkpointed if self.config.grad_checkpoint else self._whole
        with patched(self._call_sites):
            loss, grads = loss_and_grads(parameters, batch)
        return loss, grads, batch.weights.sum()

    def _whole(self, parameters: Arrays, batch: ShiftedBatch) -> tuple[mx.array, Arrays]:
        """Differentiate the model's forward pass, with the loss at once or in chunks."""
        if not self.config.loss_chunk:

            def summed_loss(p: Arrays) -> mx.array:
                return nats(self._logits(p, batch), batch.targets, batch.weights)

            return mx.value_and_grad(summed_loss)(parameters)

        # The gradient of the loss by the hidden state is made chunk by chunk. Its product with the
        # hidden state has that gradient, too, so differentiating the product goes on from there.
        def surrogate(p: Arrays) -> tuple[mx.array, mx.array, Arrays]:
            hidden = self._hidden(p, batch)  # (batch, length, hidden)
            outside = self._outside(parameters)
            loss, cotangent, outer = self._loss(mx.stop_gradient(hidden), outside, batch)
            self._set(p)
            return (hidden * mx.stop_gradient(cotangent)).sum(), loss, outer

        (_, loss, outer), grads = mx.value_and_grad(surrogate)(parameters)
        for path, grad in outer.items():
            grads[path] = grads[path] + grad
        return loss, grads

    def _checkpointed(self, parameters: Arrays, batch: ShiftedBatch) -> tuple[mx.array, Arrays]:
        """Keep the input of each block, and compute a block again for its gradient.

        The numbers are those of the table at the top of this file.
        """
        stack = self._stack()
        of_block = self._by_block(parameters)
        outside = self._outside(parameters)
        self._set(parameters)
        x, calls = stack.before(batch.inputs, batch.segments)  # 1; (batch, length, hidden)
        inputs = []
        for block, (args, kwargs) in zip(stack.blocks, calls, strict=True):  # 3
            inputs.append(x)
            x = block(x, *args, **kwargs)
        loss, cotangent, grads = self._loss(x, outside, batch)  # 4
        trained = (number for number, own in enumerate(of_block) if own)
        lowest = 0 if outside else next(trained, len(of_block))
        for i in reversed(range(lowest, len(of_block))):  # 5
            cotangent, block_grads = _block_backward(
                stack.blocks[i], inputs.pop(), of_block[i], calls[i], cotangent
            )
            for path, grad in block_grads.items():
                grads[f"{self._prefix}{i}.{path}"] = grad
        if outside:  # 6

            def before(*arrays: mx.array) -> list[mx.array]:
                return self._before(outside, arrays, batch)

            _, more = mx.vjp(before, list(outside.values()), [cotangent])
            for path, grad in zip(outside, more, strict=True):
                grads[path] = grads[path] + grad
        # evaluated in this order, each block's input is let go in time
        return loss, {path: grads[path] for path in parameters}

    def _loss(
        self, hidden: mx.array, outside: Arrays, batch: ShiftedBatch
    ) -> tuple[mx.array, mx.array, Arrays]:
        """Return the loss, and its gradients by the last hidden state and by ``outside``.

        The logits of one chunk of positions exist at a time.

        Args:
            hidden: ``(batch, length, hidden)``.
            outside: trainable arrays outside the blocks, by path.
            batch: targets and weights.
        """
        rows = hidden.reshape(1, -1, hidden.shape[-1])  # (1, positions, hidden)
        labels = batch.targets.reshape(1, -1)
        weights = batch.weights.reshape(1, -1)
        size = self.config.loss_chunk or rows.shape[1]
        starts = range(0, rows.shape[1], size)
        dropout_keys = self._dropout_keys_of_chunks(len(starts))
        total = mx.array(0.0)
        cotangents: list[mx.array] = []
        sums = [mx.zeros_like(array) for array in outside.values()]
        with ExitStack() as contexts:
            for head in self._heads:
                contexts.enter_context(head.dequantized_once(hidden))
            for n, start in enumerate(starts):
                self._set({path: keys[n] for path, keys in dropout_keys.items()})
                part = slice(start, start + size)
                # the next chunk waits for the last, or all logits would exist at once
                (chunk,) = mx.depends([rows[:, part]], [total, *cotangents[-1:]])
                loss, cotangent, *outer = self._loss_of_chunk(
                    chunk, outside, labels[:, part], weights[:, part]
                )
                total = total + loss
                cotangents.append(cotangent)
                sums = [a + b for a, b in zip(sums, outer, strict=True)]
        by_hidden = mx.concatenate(cotangents, axis=1).reshape(hidden.shape)
        return total, by_hidden, dict(zip(outside, sums, strict=True))

    def _loss_of_chunk(
        self, rows: mx.array, outside: Arrays, labels: mx.array, weights: mx.array
    ) -> list[mx.array]:
        """Return the loss of some positions, its gradient by ``rows``, and those by ``outside``.

        Args:
            rows: last hidden state, ``(1, positions, hidden)``.
            outside: trainable arrays outside the blocks, by path.
            labels: ``(1, positions)``.
            weights: ``(1, positions)``.
        """

        def logits(h: mx.array, *outer: mx.array) -> mx.array:
            self._set(dict(zip(outside, outer, strict=True)))
            return self._stack().after(h)

        primals = [rows, *outside.values()]
        loss, slope = nats_and_slope(logits(*primals), labels, weights)
        # products are linear, so the logits of this second pass are never computed
        _, gradients = mx.vjp(lambda *a: [logits(*a)], primals, [slope])
        return [loss, *gradients]

    def _dropout_keys_of_chunks(self, count: int) -> dict[str, mx.array | list[mx.array]]:
        """Return a key for each chunk, by path of the head's: each chunk drops its own inputs."""
        split: dict[str, mx.array | list[mx.array]] = {}
        for path, key in self._outside(self._dropout_keys).items():
            split[path] = [key] if count == 1 else mx.random.split(key, count)
        return split

    def _logits(self, parameters: Arrays, batch: ShiftedBatch) -> mx.array:
        """Return ``(batch, length, vocabulary)``."""
        self._set(parameters)
        return run(self.module, batch.inputs, batch.segments)

    def _hidden(self, parameters: Arrays, batch: ShiftedBatch) -> mx.array:
        """Return the last block's output, ``(batch, length, hidden)``."""
        self._set(parameters)
        stack = self._stack()
        x, calls = stack.before(batch.inputs, batch.segments)
        for block, (args, kwargs) in zip(stack.blocks, calls, strict=True):
            x = block(x, *args, **kwargs)
        return x

    def _before(
        self, outside: Arrays, arrays: Sequence[mx.array], batch: ShiftedBatch
    ) -> list[mx.array]:
        """Return the first block's input as a function of the arrays outside the blocks."""
        self._set(dict(zip(outside, arrays, strict=True)))
        x, _ = self._stack().before(batch.inputs, batch.segments)
        return [x]

    def _outside(self, arrays: Arrays) -> Arrays:
        """Return the arrays that do not belong to a block."""
        prefix = f"{self._stack().path}."
        outside = {}
        for path, array in arrays.items():
            if not path.startswith(prefix):
                outside[path] = array
        return outside

    def _by_block(self, arrays: Arrays) -> list[Arrays]:
        """Return the arrays of each block, by path within it."""
        of_block: list[Arrays] = [{} for _ in self._stack().blocks]
        for path, array in arrays.items():
            if path.startswith(self._prefix):
                number, _, rest = path.removeprefix(self._prefix).partition(".")
                of_block[int(number)][rest] = array
        return of_block

    def _stack(self) -> BlockStack:
        assert self.stack is not None  # made wherever checkpoints or chunks are wanted
        return self.stack

    def _set(self, arrays: Arrays) -> None:
        """Put arrays by path into the model."""
        self.module.update(tree_unflatten(list(arrays.items())))


def _block_backward(
    block: nn.Module, x: mx.array, trained: Arrays, call: BlockCall, cotangent: mx.array
) -> tuple[mx.array, Arrays]:
    """Compute a block again; return the gradients by its input and by its trained arrays.

    Args:
        block: as it stands in the model; it is left as it was.
        x: its input, ``(batch, length, hidden)``.
        trained: by path within the block.
        call: its other arguments.
        cotangent: gradient by its output, ``(batch, length, hidden)``.
    """
    every = dict(tree_flatten(block.parameters()))
    frozen: Arrays = {path: array for path, array in every.items() if path not in trained}
    # Nothing of the block may be computed before its gradient is due, or it would be kept since the
    # forward pass. So all that it reads depends on the cotangent.
    arrays = [x, *trained.values(), *frozen.values()]
    later = mx.depends(arrays, [cotangent])
    count = 1 + len(trained)
    primals = later[:count]
    frozen_later = dict(zip(frozen, later[count:], strict=True))

    def put(arrays: Arrays) -> None:
        block.update(tree_unflatten(list(arrays.items())))

    def forward(h: mx.array, *arrays: mx.array) -> list[mx.array]:
        trained_now = dict(zip(trained, arrays, strict=True))
        put(frozen_later | trained_now)
        return [block(h, *call.args, **call.kwargs)]

    try:
        _, (by_x, *grads) = mx.vjp(forward, primals, [cotangent])
    finally:
        put(frozen | trained)
    return by_x, dict(zip(trained, grads, strict=True))
