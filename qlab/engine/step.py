"""One step of training: a batch → the sum of the loss, its gradients, and the number of tokens.

Three ways to the same numbers. The whole graph keeps what every block computed until the way back; with checkpoints only
the input of each block is kept, and a block is computed again when its gradient is due; both stay lazy. ``stepped.py`` does
the latter a block at a time. Knows no data and no schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from qlab.core.spec import ModelSpec
from qlab.core.training import LoRAConfig, TrainConfig
from qlab.engine.experts import FrozenExperts
from qlab.engine.linear import Frozen
from qlab.engine.loss import Arrays, Given, Sums, given, nats, nats_and_slope
from qlab.engine.patches import patched, users
from qlab.engine.segments import takes_batches
from qlab.engine.stack import Stack, run
from qlab.engine.stepped import Stepped
from qlab.engine.surgery import map_layers, module_at
from qlab.errors import ConfigError, UnsupportedError


@dataclass(frozen=True)
class Compute:
    """How the frozen layers are computed.

    Attributes:
        dtype: of the activations; None leaves the model's own.
        dequantize: whether products are made from dequantized weights, or by MLX's quantized kernels.
    """

    dtype: mx.Dtype | None
    dequantize: bool


def attach(module: nn.Module, spec: ModelSpec, lora: LoRAConfig | None, compute: Compute, checkpoint: bool) -> nn.Module:
    """Return a twin of a model, frozen but for the adapters, with its products made as told.

    Args:
        module: an mlx-lm model; it is not changed.
        spec: its layers.
        lora: the adapters; None for none.
        compute: how frozen layers are computed.
        checkpoint: whether blocks are computed again on the way back.

    Raises:
        ConfigError, LayerNotFoundError: the adapter does not fit the model.
    """
    targets = {layer.path for layer in lora.targets(spec)} if lora else set()

    def make(path: str, layer: nn.Module) -> nn.Module:
        if compute.dequantize or compute.dtype is not None or path in targets:
            frozen = FrozenExperts if spec[path].kind == "switch" else Frozen
            layer = frozen(layer, compute.dtype, compute.dequantize, keep=checkpoint)
        return lora.adapter.make(layer, spec[path].shape, lora) if path in targets else layer  # type: ignore

    made = map_layers(module, [layer.path for layer in spec.layers], make)
    made.freeze()
    for path in targets:
        module_at(made, path).unfreeze(keys=list(lora.adapter.shapes(spec[path].shape, lora.rank)), recurse=False)  # type: ignore
    return made


class Step:
    """Loss and gradients of a model as one lazy graph, which is compiled on a CPU.

    Args:
        module: what ``attach`` returned; nobody else may use it.
        config: checkpoints, chunk of the loss.

    Attributes:
        parameters: trainable arrays by path.
        how: ``whole`` or ``checkpointed``.
        notes: how it is computed and why, in words.
        traces: compiled so far: on a CPU one for each shape, elsewhere none.

    Raises:
        UnsupportedError: checkpoints or a chunked loss are wanted, and the model cannot be taken apart.
    """

    def __init__(self, module: nn.Module, config: TrainConfig) -> None:
        self.module, self.config = module, config
        self.how = "checkpointed" if config.grad_checkpoint else "whole"
        self.notes: tuple[str, ...] = ()
        self.traces = 0
        self.stack = Stack(module) if config.grad_checkpoint or config.loss_chunk else None
        self.parameters: Arrays = dict(tree_flatten(module.trainable_parameters()))
        within = f"{self.stack.path}." if self.stack else ""
        self._heads = [x for path, x in module.named_modules() if isinstance(x, Frozen) and not path.startswith(within)]
        self._keys = [path for path, _ in tree_flatten(module.parameters()) if path.endswith("dropout_key")]
        self._users = users(module)
        self._drops: Arrays = {}  # the key of each layer, for the batch at hand
        self._compiled = mx.compile(self._trace)  # a CPU computes exponentials fast only where they are compiled

    def __call__(
        self,
        parameters: Arrays,
        tokens: mx.array,
        mask: mx.array,
        key: mx.array | None = None,
        segments: mx.array | None = None,
    ) -> Sums:
        """Compute lazily.

        Args:
            parameters: trainable arrays by path.
            tokens: ``(batch, length)`` integers.
            mask: ``(batch, length)``, 1 where a token is a target; the first of a row never is.
            key: of the random generator, for dropout; the same key drops the same inputs. Needed if there is dropout.
            segments: ``(batch, length)``, 1, 2, … for the packed rows in a row, 0 for padding; None if rows are not packed.
        """
        drops: Arrays = {}
        if self._keys:
            if key is None:
                raise ValueError("Dropout needs a key, a new one for every batch.")
            drops = dict(zip(self._keys, mx.random.split(key, len(self._keys)), strict=True))
        compute = self._compiled if mx.default_device() == mx.cpu else self._compute
        ordered = {path: parameters[path] for path in self.parameters}  # another order would be compiled anew
        try:
            loss, grads, count = compute(ordered, drops, tokens, mask, segments)
        finally:
            self._set(drops | parameters)
        return Sums(loss, {path: grads[path] for path in parameters}, count)

    def _trace(self, *given: Any) -> tuple[mx.array, Arrays, mx.array]:
        self.traces += 1
        return self._compute(*given)

    def _compute(
        self, parameters: Arrays, drops: Arrays, tokens: mx.array, mask: mx.array, segments: mx.array | None
    ) -> tuple[mx.array, Arrays, mx.array]:
        self._drops = drops
        self._set(drops)
        batch = given(tokens, mask, segments)
        with patched(self._users):
            how = self._checkpointed if self.config.grad_checkpoint else self._whole
            loss, grads = how(parameters, batch)
        return loss, grads, batch.weights.sum()

    def _whole(self, parameters: Arrays, batch: Given) -> tuple[mx.array, Arrays]:
        targets, weights = batch.targets, batch.weights
        if not self.config.loss_chunk:
            return mx.value_and_grad(lambda p: nats(self._run(p, batch), targets, weights))(parameters)

        def surrogate(p: Arrays) -> tuple[mx.array, mx.array, Arrays]:
            hidden = self._hidden(p, batch)
            loss, cotangent, outer = self._loss(mx.stop_gradient(hidden), self._outside(parameters), targets, weights)
            self._set(p)
            return (hidden * mx.stop_gradient(cotangent)).sum(), loss, outer

        (_, loss, outer), grads = mx.value_and_grad(surrogate)(parameters)
        return loss, {path: grad + outer[path] if path in outer else grad for path, grad in grads.items()}

    def _checkpointed(self, parameters: Arrays, batch: Given) -> tuple[mx.array, Arrays]:
        stack, prefix = self.stack, f"{self.stack.path}."
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
            _, more = mx.vjp(lambda *a: self._before(outside, a, batch), list(outside.values()), [cotangent])
            grads |= {path: grads[path] + grad for path, grad in zip(outside, more, strict=True)}
        return loss, {path: grads[path] for path in parameters}  # evaluated in this order, each block's input is let go in time

    def _loss(
        self, hidden: mx.array, outside: Arrays, targets: mx.array, weights: mx.array
    ) -> tuple[mx.array, mx.array, Arrays]:
        """Sum of the loss, and its gradients by the last hidden state and by the parameters outside the blocks.

        The logits of one chunk of tokens exist at a time.
        """
        shape, chunk = hidden.shape, self.config.loss_chunk or hidden.shape[0] * hidden.shape[1]
        rows, labels, share = hidden.reshape(1, -1, shape[-1]), targets.reshape(1, -1), weights.reshape(1, -1)

        def logits(h: mx.array, *outer: mx.array) -> mx.array:
            self._set(dict(zip(outside, outer, strict=True)))
            return self.stack.after(h)

        total, found, sums = mx.array(0.0), [], [mx.zeros_like(a) for a in outside.values()]
        starts = range(0, rows.shape[1], chunk)
        # each chunk drops inputs of its own
        several = len(starts) > 1
        drops = {p: mx.random.split(k, len(starts)) if several else [k] for p, k in self._outside(self._drops).items()}
        with ExitStack() as stack:
            for head in self._heads:
                stack.enter_context(head.once(hidden))
            for n, start in enumerate(starts):
                self._set({path: keys[n] for path, keys in drops.items()})
                label, part = labels[:, start : start + chunk], share[:, start : start + chunk]
                (piece,) = mx.depends([rows[:, start : start + chunk]], [total, *found[-1:]])  # one chunk after the other
                given = [piece, *outside.values()]
                made = logits(*given)
                loss, slope = nats_and_slope(made, label, part)
                # the products are linear, so the logits of this second pass are never computed
                _, (cotangent, *outer) = mx.vjp(lambda *a: [logits(*a)], given, [slope])
                total, found = total + loss, [*found, cotangent]
                sums = [a + b for a, b in zip(sums, outer, strict=True)]
        return total, mx.concatenate(found, axis=1).reshape(shape), dict(zip(outside, sums, strict=True))

    def _run(self, parameters: Arrays, batch: Given) -> mx.array:
        self._set(parameters)
        return run(self.module, batch.inputs, batch.segments)

    def _hidden(self, parameters: Arrays, batch: Given) -> mx.array:
        self._set(parameters)
        x, calls = self.stack.before(batch.inputs, batch.segments)
        for block, (args, kwargs) in zip(self.stack.blocks, calls, strict=True):
            x = block(x, *args, **kwargs)
        return x

    def _before(self, outside: Arrays, arrays: tuple[mx.array, ...], batch: Given) -> list[mx.array]:
        self._set(dict(zip(outside, arrays, strict=True)))
        return [self.stack.before(batch.inputs, batch.segments)[0]]

    def _outside(self, parameters: Arrays) -> Arrays:
        return {path: array for path, array in parameters.items() if not path.startswith(f"{self.stack.path}.")}

    def _set(self, parameters: Arrays) -> None:
        self.module.update(tree_unflatten(list(parameters.items())))


def _back(
    block: nn.Module, x: mx.array, parameters: Arrays, call: tuple[tuple, dict], cotangent: mx.array
) -> tuple[mx.array, Arrays]:
    """Compute a block again and return the gradients by its input and by its trainable arrays."""
    args, kwargs = call
    frozen = [(path, array) for path, array in tree_flatten(block.parameters()) if path not in parameters]
    names, arrays = [path for path, _ in frozen], [array for _, array in frozen]
    # nothing of the block may be computed before its gradient is due, or it would be kept since the way forward
    tied = mx.depends([x, *parameters.values(), *arrays], [cotangent])
    leaves, rest = tied[: 1 + len(parameters)], tied[1 + len(parameters) :]

    def forward(h: mx.array, *own: mx.array) -> list[mx.array]:
        block.update(tree_unflatten([*zip(names, rest, strict=True), *zip(parameters, own, strict=True)]))
        return [block(h, *args, **kwargs)]

    try:
        _, (dx, *grads) = mx.vjp(forward, leaves, [cotangent])
    finally:
        block.update(tree_unflatten([*frozen, *parameters.items()]))
    return dx, dict(zip(parameters, grads, strict=True))


def make_step(module: nn.Module, config: TrainConfig, *, how: str = "auto") -> Any:
    """Return the step of a run: ``step(parameters, tokens, mask, key=None, segments=None) -> Sums``. Computes on few tokens.

    Args:
        module: what ``attach`` returned, its arrays in memory; nobody else may use it.
        config: checkpoints, blocks in flight, chunk of the loss, packing.
        how: ``whole`` (one graph), ``stepped`` (a block at a time) or ``auto``: stepped wherever blocks are computed again
            on the way back, if the model can be taken apart.

    Raises:
        ConfigError: no such way.
        UnsupportedError: the model cannot be computed so, or cannot keep packed rows apart.
    """
    if how not in WAYS:
        raise ConfigError(f"how={how!r} is not legal; choose one of {', '.join(WAYS)}.")
    note = ""
    try:
        stack = Stack(module)
        stack.check()
    except UnsupportedError as error:
        if how == "stepped":
            raise
        stack, config = None, replace(config, grad_checkpoint=False, loss_chunk=0)
        note = f"step: whole, neither checkpoints nor a chunked loss, because the model cannot be taken apart: {error}"
    if stack and (how == "stepped" or how == "auto" and config.grad_checkpoint):
        step: Any = Stepped(module, config)
    else:
        step = Step(module, config)
        step.notes = (note or f"step: {step.how}, as one graph",)
    if config.pack and not takes_batches(_logits(module, stack), config.max_seq_length - 1):
        step = _RowByRow(step)
    return step


WAYS = ("auto", "whole", "stepped")


def _logits(module: nn.Module, stack: Stack | None) -> Callable[[mx.array, mx.array | None], mx.array]:
    if stack:
        return lambda tokens, segments: stack.logits(tokens, segments, last=8)
    return lambda tokens, segments: run(module, tokens, segments)


class _RowByRow:
    """A step for models whose attention takes one mask for all rows: packed rows pass one at a time, and are added up."""

    def __init__(self, step: Any) -> None:
        self._step = step
        self.notes = (*step.notes, "packed rows pass one at a time: this model takes one mask for all")

    def __call__(
        self,
        parameters: Arrays,
        tokens: mx.array,
        mask: mx.array,
        key: mx.array | None = None,
        segments: mx.array | None = None,
    ) -> Sums:
        if segments is None:
            return self._step(parameters, tokens, mask, key)
        keys = [None] * len(tokens) if key is None else mx.random.split(key, len(tokens))
        total: Sums | None = None
        for i, own in enumerate(keys):
            row = slice(i, i + 1)
            sums = self._step(parameters, tokens[row], mask[row], own, segments[row])
            total = sums if total is None else total.plus(sums)
            mx.eval(total)
        return total  # type: ignore

    def __getattr__(self, name: str) -> Any:
        return getattr(self._step, name)
