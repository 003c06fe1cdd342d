"""One step of training: a batch → the sum of the loss, its gradients, and the number of tokens. Everything stays lazy.

Two ways to the same numbers. The whole graph keeps what every block computed until the way back; with checkpoints only
the input of each block is kept, and a block is computed again when its gradient is due. Knows no data and no schedule.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from qlab.core.spec import ModelSpec
from qlab.core.training import LoRAConfig, TrainConfig
from qlab.engine.linear import Frozen
from qlab.engine.stack import Stack
from qlab.engine.surgery import map_layers, module_at

Arrays = dict[str, mx.array]
_PLAIN_CLASSES = ("linear", "embedding")


class Sums(NamedTuple):
    """What one batch, or several, add up to.

    Attributes:
        loss: in nats over the targets, float32.
        grads: of that loss by path.
        count: number of targets, float32.
    """

    loss: mx.array
    grads: Arrays
    count: mx.array

    def plus(self, other: Sums) -> Sums:
        """Add another batch."""
        grads = {path: grad + other.grads[path] for path, grad in self.grads.items()}
        return Sums(self.loss + other.loss, grads, self.count + other.count)


@dataclass(frozen=True)
class Compute:
    """How the frozen layers are computed.

    Attributes:
        dtype: of the activations; None leaves the model's own.
        dequantize: whether products are made from dequantized weights, or by MLX's quantized kernels.
        traced: whether the graph will be read instead of run, so that it must hold nothing that cannot be read.
    """

    dtype: mx.Dtype | None
    dequantize: bool
    traced: bool = False


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
    plain = [layer.path for layer in spec.layers if layer.kind in _PLAIN_CLASSES]

    def make(path: str, layer: nn.Module) -> nn.Module:
        if compute.dequantize or compute.dtype is not None or path in targets:
            layer = Frozen(layer, compute.dtype, compute.dequantize, keep=checkpoint or compute.traced)
        return lora.adapter.make(layer, spec[path].shape, lora) if path in targets else layer  # type: ignore

    made = map_layers(module, plain, make)
    made.freeze()
    for path in targets:
        module_at(made, path).unfreeze(keys=list(lora.adapter.shapes(spec[path].shape, lora.rank)), recurse=False)  # type: ignore
    return made


class Step:
    """Loss and gradients of a model.

    Args:
        module: what ``attach`` returned; nobody else may use it.
        config: checkpoints, chunk of the loss.

    Raises:
        UnsupportedError: checkpoints or a chunked loss are wanted, and the model cannot be taken apart.
    """

    def __init__(self, module: nn.Module, config: TrainConfig) -> None:
        self.module, self.config = module, config
        self.stack = Stack(module) if config.grad_checkpoint or config.loss_chunk else None
        self.parameters: Arrays = dict(tree_flatten(module.trainable_parameters()))
        within = f"{self.stack.path}." if self.stack else ""
        self._heads = [x for path, x in module.named_modules() if isinstance(x, Frozen) and not path.startswith(within)]
        self._keys = [path for path, _ in tree_flatten(module.parameters()) if path.endswith("dropout_key")]
        self._drops: Arrays = {}  # the key of each layer, for the batch at hand

    def __call__(self, parameters: Arrays, tokens: mx.array, mask: mx.array, key: mx.array | None = None) -> Sums:
        """Compute lazily.

        Args:
            parameters: trainable arrays by path.
            tokens: ``(batch, length)`` integers.
            mask: ``(batch, length)``, 1 where a token is a target; the first of a row never is.
            key: of the random generator, for dropout; the same key drops the same inputs. Needed if there is dropout.
        """
        if self._keys:
            if key is None:
                raise ValueError("Dropout needs a key, a new one for every batch.")
            self._drops = dict(zip(self._keys, mx.random.split(key, len(self._keys)), strict=True))
            self._set(self._drops)
        inputs, targets, weights = tokens[:, :-1], tokens[:, 1:], mask[:, 1:].astype(mx.float32)
        if self.config.grad_checkpoint:
            loss, grads = self._checkpointed(parameters, inputs, targets, weights)
        else:
            loss, grads = self._whole(parameters, inputs, targets, weights)
        self._set(parameters)
        return Sums(loss, grads, weights.sum())

    def _whole(self, parameters: Arrays, inputs: mx.array, targets: mx.array, weights: mx.array) -> tuple[mx.array, Arrays]:
        if not self.config.loss_chunk:
            return mx.value_and_grad(lambda p: _nats(self._run(p, inputs), targets, weights))(parameters)

        def surrogate(p: Arrays) -> tuple[mx.array, mx.array, Arrays]:
            hidden = self._hidden(p, inputs)
            loss, cotangent, outer = self._loss(mx.stop_gradient(hidden), self._outside(parameters), targets, weights)
            self._set(p)
            return (hidden * mx.stop_gradient(cotangent)).sum(), loss, outer

        (_, loss, outer), grads = mx.value_and_grad(surrogate)(parameters)
        return loss, {path: grad + outer[path] if path in outer else grad for path, grad in grads.items()}

    def _checkpointed(
        self, parameters: Arrays, inputs: mx.array, targets: mx.array, weights: mx.array
    ) -> tuple[mx.array, Arrays]:
        stack, prefix = self.stack, f"{self.stack.path}."
        mine: list[Arrays] = [{} for _ in stack.blocks]
        for path, array in parameters.items():
            if path.startswith(prefix):
                number, _, rest = path[len(prefix) :].partition(".")
                mine[int(number)][rest] = array
        outside = self._outside(parameters)
        self._set(parameters)
        x, calls = stack.before(inputs)
        kept = []
        for block, (args, kwargs) in zip(stack.blocks, calls, strict=True):
            kept.append(x)
            x = block(x, *args, **kwargs)
        loss, cotangent, grads = self._loss(x, outside, targets, weights)
        lowest = 0 if outside else next((i for i, own in enumerate(mine) if own), len(mine))
        for i in reversed(range(lowest, len(mine))):
            cotangent, own = _back(stack.blocks[i], kept.pop(), mine[i], calls[i], cotangent)
            grads |= {f"{prefix}{i}.{path}": grad for path, grad in own.items()}
        if outside:
            _, more = mx.vjp(lambda *a: self._before(outside, a, inputs), list(outside.values()), [cotangent])
            grads |= {path: grads[path] + grad for path, grad in zip(outside, more, strict=True)}
        return loss, grads

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
                loss, slope = _nats_and_slope(made, label, part)
                # the products are linear, so the logits of this second pass are never computed
                _, (cotangent, *outer) = mx.vjp(lambda *a: [logits(*a)], given, [slope])
                total, found = total + loss, [*found, cotangent]
                sums = [a + b for a, b in zip(sums, outer, strict=True)]
        return total, mx.concatenate(found, axis=1).reshape(shape), dict(zip(outside, sums, strict=True))

    def _run(self, parameters: Arrays, inputs: mx.array) -> mx.array:
        self._set(parameters)
        return self.module(inputs)

    def _hidden(self, parameters: Arrays, inputs: mx.array) -> mx.array:
        self._set(parameters)
        x, calls = self.stack.before(inputs)
        for block, (args, kwargs) in zip(self.stack.blocks, calls, strict=True):
            x = block(x, *args, **kwargs)
        return x

    def _before(self, outside: Arrays, arrays: tuple[mx.array, ...], inputs: mx.array) -> list[mx.array]:
        self._set(dict(zip(outside, arrays, strict=True)))
        return [self.stack.before(inputs)[0]]

    def _outside(self, parameters: Arrays) -> Arrays:
        return {path: array for path, array in parameters.items() if not path.startswith(f"{self.stack.path}.")}

    def _set(self, parameters: Arrays) -> None:
        self.module.update(tree_unflatten(list(parameters.items())))


def _nats(logits: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
    """Sum of the cross-entropy in nats over the targets; float32."""
    return (nn.losses.cross_entropy(logits.astype(mx.float32), targets) * weights).sum()


def _nats_and_slope(logits: mx.array, targets: mx.array, weights: mx.array) -> tuple[mx.array, mx.array]:
    """Sum of the cross-entropy in nats, and its gradient by the logits: probabilities, less one at the target, weighted.

    Written out, because it needs one array of the size of the logits where differentiation keeps four.
    """
    full = logits.astype(mx.float32)
    log_sum = mx.logsumexp(full, -1, keepdims=True)
    nats = ((log_sum - mx.take_along_axis(full, targets[..., None], -1))[..., 0] * weights).sum()
    hit = mx.arange(logits.shape[-1]) == targets[..., None]
    probabilities = mx.exp(full - log_sum)
    return nats, (mx.where(hit, probabilities - 1, probabilities) * weights[..., None]).astype(logits.dtype)


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
