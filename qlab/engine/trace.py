"""Reads the graph of a training step without computing it: from a config alone, for every architecture of mlx-lm.

Knows no budget. Runs on the MLX thread.
"""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from qlab.core.config import QuantConfig
from qlab.core.graph import Graph, unmerged
from qlab.core.training import TrainConfig
from qlab.engine.device import backend
from qlab.engine.export import stored_layer
from qlab.engine.linear import PackedEmbedding, PackedLinear, weight_of
from qlab.engine.loss import Arrays, Sums
from qlab.engine.reading import read
from qlab.engine.step import Step
from qlab.engine.surgery import map_layers
from qlab.engine.update import Update

_UNREADABLE = {"nvfp4", "nvfp4_plain", "mxfp8"}  # the CPU's dequantization has a primitive that cannot be exported (FromFP8)


def stored(module: nn.Module, configs: dict[str, QuantConfig]) -> nn.Module:
    """Return a twin of a model, to be read and never run, whose layers are stored under configs; nothing is computed.

    Args:
        module: the model; its own weights may be lazy.
        configs: by path.
    """

    def make(path: str, layer: nn.Module) -> nn.Module:
        config, weight = configs[path], weight_of(layer)
        dtype = str(weight.dtype).removeprefix("mlx.core.")
        layout = config.scheme.layout(weight.shape, config, dtype)
        packed = {name: mx.zeros(shape, getattr(mx, kind)) for name, (shape, kind) in layout.items()}
        kind = "embedding" if hasattr(layer, "as_linear") else "linear" if weight.ndim == 2 else "switch"
        if config.mode in _UNREADABLE and kind != "switch" and backend() == "cpu":
            made: nn.Module = (_ReadableEmbedding if kind == "embedding" else _ReadableLinear)(
                packed, config, weight.shape, weight.dtype
            )
        else:
            made = stored_layer(packed, config, weight.shape, weight.dtype, kind)
        if "bias" in layer:
            made.bias = layer.bias
        return made

    return map_layers(module, list(configs), make)


class _ReadableLinear(PackedLinear):
    """A layer whose dequantization makes the same arrays as MLX's, without the primitive that cannot be read."""

    def dense(self, dtype: mx.Dtype | None = None) -> mx.array:
        return _numbers(self.packed, self.config, dtype or self._dtype)


class _ReadableEmbedding(PackedEmbedding):
    def __call__(self, tokens: mx.array) -> mx.array:
        dtype = mx.bfloat16 if self.config.scheme.stock_mode else self._dtype  # MLX's own layer gives bfloat16
        return _numbers(self.config.scheme.take(self.packed, tokens), self.config, dtype)

    dense = _ReadableLinear.dense


def _numbers(packed: dict[str, mx.array], config: QuantConfig, dtype: mx.Dtype) -> mx.array:
    """Arrays of the sizes that ``mx.dequantize`` makes on the CPU (``mlx/ops.cpp``); the values mean nothing."""
    codes, scales, group = packed["weight"], packed["scales"], config.group_size
    if config.bits == 8:
        values = codes.view(mx.uint8).astype(dtype).reshape(-1, group)
        factors = mx.power(mx.array(2.0, dtype), scales.reshape(-1, 1).astype(dtype) - mx.array(127.0, dtype))
    else:
        table, bytes_ = mx.zeros(16, dtype), codes.reshape(-1, 4).view(mx.int8)
        halves = [table[(bytes_ & 15).astype(mx.int8)][..., None], table[(bytes_ >> 4).astype(mx.int8)][..., None]]
        values, factors = mx.concatenate(halves, -1).reshape(-1, group), scales.reshape(-1, 1).astype(dtype)
    dense = (values * factors).reshape(*codes.shape[:-1], -1)
    return dense * (packed["global_scale"].astype(dtype) / 2688.0) if "global_scale" in packed else dense


def whole(module: nn.Module, train: TrainConfig) -> Graph:
    """Return the graph of one optimizer step on the largest batch, taken as one.

    Args:
        module: what ``attach`` returned, its arrays lazy or not; nobody else may use it.
        train: the run.

    Raises:
        UnsupportedError: the step cannot be built for this model, or cannot be read.
    """
    step = Step(module, train)
    several = train.grad_accumulation_steps > 1
    update = Update(train, step.parameters)
    frozen = {path: array for path, array in tree_flatten(module.parameters()) if path not in step.parameters}
    groups: list[tuple[str, dict[str, mx.array]]] = [
        ("weights", frozen), ("adapter", step.parameters), ("optimizer", update.state),
        ("gradients", step.parameters if several else {}),
    ]  # fmt: skip
    batch = mx.zeros((train.batch_size, train.max_seq_length), mx.int32)
    rest = [batch, batch, mx.array(0.0), mx.array(0.0), mx.random.key(0), mx.array(0.0)]
    flat = [array for _, group in groups for array in group.values()]

    def run(*arrays: mx.array) -> list[mx.array]:
        given = iter(arrays)
        weights, parameters, state, sums = ({path: next(given) for path in group} for _, group in groups)
        tokens, mask, loss, count, key, rate = given
        module.update(tree_unflatten(list(weights.items())))
        found = step(parameters, tokens, mask, key, tokens if train.pack else None)
        return updated(update, parameters, state, found, Sums(loss, sums, count) if several else None, rate)

    roles = [role for role, group in groups for _ in group] + ["batch"] * len(rest)
    try:
        graph = unmerged(read(run, [*flat, *rest], roles), True)
    finally:
        module.update(tree_unflatten(list(frozen.items())))
    return kept(graph, len(step.parameters) + len(update.state) + 3)


def updated(
    update: Update, parameters: Arrays, state: Arrays, found: Sums, earlier: Sums | None, rate: mx.array
) -> list[mx.array]:
    """Return what the training loop asks for, in its order, and then what it holds on to meanwhile."""
    sums = earlier.plus(found) if earlier else found
    new = update(parameters, state, sums, rate)
    held = [*found.grads.values(), *(sums.grads.values() if earlier else ())]
    return [*new.parameters.values(), *new.state.values(), new.loss, new.grad_norm, new.finite, *held]


def kept(graph: Graph, asked: int) -> Graph:
    """Take what is only held on to out of what is asked for."""
    return replace(graph, outputs=graph.outputs[:asked], held=[*graph.held, *graph.outputs[asked:]])
