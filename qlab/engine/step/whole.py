"""One step of training: a batch → the sum of the loss, its gradients, and the number of tokens.

Three ways to the same numbers. The whole graph keeps what every block computed until the way back;
with checkpoints only the input of each block is kept, and a block is computed again when its
gradient is due; both stay lazy. ``blockwise.py`` does the latter a block at a time. Knows no data
and no schedule.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from qlab.core.config.train import TrainConfig
from qlab.engine.models.blocks import BlockStack, run
from qlab.engine.step.loss import ShiftedBatch, nats, nats_and_slope, shifted
from qlab.engine.step.patches import patched, users
from qlab.engine.step.protocol import Arrays, LossAndGradients, StepBatch
from qlab.nn.frozen import Frozen


class WholeGraphStep:
    """Loss and gradients of a model as one lazy graph, which is compiled on a CPU.

    Args:
        module: what ``attach`` returned; nobody else may use it.
        config: checkpoints, chunk of the loss.
        note: why it is computed as one graph, if that is not what was asked for.

    Attributes:
        parameters: trainable arrays by path.
        how: ``whole`` or ``checkpointed``.
        notes: how it is computed and why, in words.
        traces: compiled so far: on a CPU one for each shape, elsewhere none.

    Raises:
        UnsupportedError: checkpoints or a chunked loss are wanted, and the model cannot be taken
            apart.
    """

    def __init__(self, module: nn.Module, config: TrainConfig, note: str = "") -> None:
        self.module = module
        self.config = config
        self.how = "checkpointed" if config.grad_checkpoint else "whole"
        self.notes = (note or f"step: {self.how}, as one graph",)
        self.traces = 0
        self.stack = BlockStack(module) if config.grad_checkpoint or config.loss_chunk else None
        self.parameters: Arrays = dict(tree_flatten(module.trainable_parameters()))
        within = f"{self.stack.path}." if self.stack else ""
        self._heads = [
            x
            for path, x in module.named_modules()
            if isinstance(x, Frozen) and not path.startswith(within)
        ]
        self._keys = [
            path for path, _ in tree_flatten(module.parameters()) if path.endswith("dropout_key")
        ]
        self._users = users(module)
        self._drops: Arrays = {}  # the key of each layer, for the batch at hand
        self._compiled = mx.compile(
            self._trace
        )  # a CPU computes exponentials fast only where they are compiled

    def __call__(self, parameters: Arrays, batch: StepBatch) -> LossAndGradients:
        """Return loss and gradients of a batch, lazily; see ``TrainStep``."""
        drops: Arrays = {}
        if self._keys:
            if batch.key is None:
                raise ValueError("Dropout needs a key, a new one for every batch.")
            keys = mx.random.split(batch.key, len(self._keys))
            drops = dict(zip(self._keys, keys, strict=True))
        compute = self._compiled if mx.default_device() == mx.cpu else self._compute
        # another order would be compiled anew
        ordered = {path: parameters[path] for path in self.parameters}
        try:
            loss, grads, count = compute(ordered, drops, batch.tokens, batch.mask, batch.segments)
        finally:
            self._set(drops | parameters)
        return LossAndGradients(loss, {path: grads[path] for path in parameters}, count)

    def _trace(self, *arguments: Any) -> tuple[mx.array, Arrays, mx.array]:
        self.traces += 1
        return self._compute(*arguments)

    def _compute(
        self,
        parameters: Arrays,
        drops: Arrays,
        tokens: mx.array,
        mask: mx.array,
        segments: mx.array | None,
    ) -> tuple[mx.array, Arrays, mx.array]:
        self._drops = drops
        self._set(drops)
        batch = shifted(StepBatch(tokens, mask, segments=segments))
        loss_and_grads = self._checkpointed if self.config.grad_checkpoint else self._whole
        with patched(self._users):
            loss, grads = loss_and_grads(parameters, batch)
        return loss, grads, batch.weights.sum()

    def _whole(self, parameters: Arrays, batch: ShiftedBatch) -> tuple[mx.array, Arrays]:
        targets = batch.targets
        weights = batch.weights
        if not self.config.loss_chunk:
            return mx.value_and_grad(lambda p: nats(self._run(p, batch), targets, weights))(
                parameters
            )

        def surrogate(p: Arrays) -> tuple[mx.array, mx.array, Arrays]:
            hidden = self._hidden(p, batch)
            loss, cotangent, outer = self._loss(
                mx.stop_gradient(hidden), self._outside(parameters), targets, weights
            )
            self._set(p)
            return (hidden * mx.stop_gradient(cotangent)).sum(), loss, outer

        (_, loss, outer), grads = mx.value_and_grad(surrogate)(parameters)
        return loss, {
            path: grad + outer[path] if path in outer else grad for path, grad in grads.items()
        }

    def _checkpointed(self, parameters: Arrays, batch: ShiftedBatch) -> tuple[mx.array, Arrays]:
        stack = self.stack
        prefix = f"{self.stack.path}."
        mine: list[Arrays] = [{} for _ in stack.blocks]
        for path, array in parameters.items():
            if path.startswith(prefix):
                number, _, rest = path[len(prefix) :].partition(".")
                mine[int(number)][rest] = array
        outside = self._outside(parameters)
        self._set(parameters)
        x, calls = stack.before(batch.inputs, batch.segments)
        kept = []
        for block, (args, kwargs) in zip(stack.blocks, calls, strict=True):
            kept.append(x)
            x = block(x, *args, **kwargs)
        loss, cotangent, grads = self._loss(x, outside, batch.targets, batch.weights)
        lowest = 0 if outside else next((i for i, own in enumerate(mine) if own), len(mine))
        for i in reversed(range(lowest, len(mine))):
            cotangent, own = _back(stack.blocks[i], kept.pop(), mine[i], calls[i], cotangent)
            grads |= {f"{prefix}{i}.{path}": grad for path, grad in own.items()}
        if outside:
            _, more = mx.vjp(
                lambda *a: self._before(outside, a, batch), list(outside.values()), [cotangent]
            )
            grads |= {path: grads[path] + grad for path, grad in zip(outside, more, strict=True)}
        return loss, {
            path: grads[path] for path in parameters
        }  # evaluated in this order, each block's input is let go in time

    def _loss(
        self, hidden: mx.array, outside: Arrays, targets: mx.array, weights: mx.array
    ) -> tuple[mx.array, mx.array, Arrays]:
        """Sum of the loss, and its gradients by the last hidden state and by the parameters outside
        the blocks.

        The logits of one chunk of tokens exist at a time.
        """
        shape = hidden.shape
        chunk = self.config.loss_chunk or hidden.shape[0] * hidden.shape[1]
        rows = hidden.reshape(1, -1, shape[-1])
        labels = targets.reshape(1, -1)
        share = weights.reshape(1, -1)

        def logits(h: mx.array, *outer: mx.array) -> mx.array:
            self._set(dict(zip(outside, outer, strict=True)))
            return self.stack.after(h)

        total = mx.array(0.0)
        found = []
        sums = [mx.zeros_like(a) for a in outside.values()]
        starts = range(0, rows.shape[1], chunk)
        # each chunk drops inputs of its own
        several = len(starts) > 1
        drops = {
            p: mx.random.split(k, len(starts)) if several else [k]
            for p, k in self._outside(self._drops).items()
        }
        with ExitStack() as stack:
            for head in self._heads:
                stack.enter_context(head.dequantized_once(hidden))
            for n, start in enumerate(starts):
                self._set({path: keys[n] for path, keys in drops.items()})
                label = labels[:, start : start + chunk]
                part = share[:, start : start + chunk]
                (piece,) = mx.depends(
                    [rows[:, start : start + chunk]], [total, *found[-1:]]
                )  # one chunk after the other
                given = [piece, *outside.values()]
                made = logits(*given)
                loss, slope = nats_and_slope(made, label, part)
                # the products are linear, so the logits of this second pass are never computed
                _, (cotangent, *outer) = mx.vjp(lambda *a: [logits(*a)], given, [slope])
                total = total + loss
                found = [*found, cotangent]
                sums = [a + b for a, b in zip(sums, outer, strict=True)]
        return (
            total,
            mx.concatenate(found, axis=1).reshape(shape),
            dict(zip(outside, sums, strict=True)),
        )

    def _run(self, parameters: Arrays, batch: ShiftedBatch) -> mx.array:
        self._set(parameters)
        return run(self.module, batch.inputs, batch.segments)

    def _hidden(self, parameters: Arrays, batch: ShiftedBatch) -> mx.array:
        self._set(parameters)
        x, calls = self.stack.before(batch.inputs, batch.segments)
        for block, (args, kwargs) in zip(self.stack.blocks, calls, strict=True):
            x = block(x, *args, **kwargs)
        return x

    def _before(
        self, outside: Arrays, arrays: tuple[mx.array, ...], batch: ShiftedBatch
    ) -> list[mx.array]:
        self._set(dict(zip(outside, arrays, strict=True)))
        return [self.stack.before(batch.inputs, batch.segments)[0]]

    def _outside(self, parameters: Arrays) -> Arrays:
        return {
            path: array
            for path, array in parameters.items()
            if not path.startswith(f"{self.stack.path}.")
        }

    def _set(self, parameters: Arrays) -> None:
        self.module.update(tree_unflatten(list(parameters.items())))


def _back(
    block: nn.Module, x: mx.array, parameters: Arrays, call: tuple[tuple, dict], cotangent: mx.array
) -> tuple[mx.array, Arrays]:
    """Compute a block again and return the gradients by its input and by its trainable arrays."""
    args, kwargs = call
    frozen = [
        (path, array) for path, array in tree_flatten(block.parameters()) if path not in parameters
    ]
    names = [path for path, _ in frozen]
    arrays = [array for _, array in frozen]
    # nothing of the block may be computed before its gradient is due, or it would be kept since the
    # way forward
    tied = mx.depends([x, *parameters.values(), *arrays], [cotangent])
    leaves = tied[: 1 + len(parameters)]
    rest = tied[1 + len(parameters) :]

    def forward(h: mx.array, *own: mx.array) -> list[mx.array]:
        block.update(
            tree_unflatten([*zip(names, rest, strict=True), *zip(parameters, own, strict=True)])
        )
        return [block(h, *args, **kwargs)]

    try:
        _, (dx, *grads) = mx.vjp(forward, leaves, [cotangent])
    finally:
        block.update(tree_unflatten([*frozen, *parameters.items()]))
    return dx, dict(zip(parameters, grads, strict=True))
