"""Reads the graph of a training step without computing it: from a config alone, for every architecture of mlx-lm.

Knows no budget. Runs on the MLX thread.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from qlab.core.config import QuantPlan
from qlab.core.graph import Array, Graph, Node
from qlab.core.spec import ModelSpec
from qlab.core.training import LoRAConfig, TrainConfig
from qlab.engine.export import chosen, stored_layer
from qlab.engine.linear import weight_of
from qlab.engine.step import Compute, Update, attach
from qlab.engine.surgery import map_layers


def stored(module: nn.Module, spec: ModelSpec, plan: QuantPlan | None) -> nn.Module:
    """Return a twin of a lazy model whose layers are stored as a plan says; nothing is computed."""
    configs = chosen(spec, plan) if plan else {}

    def make(path: str, layer: nn.Module) -> nn.Module:
        weight = weight_of(layer)
        made = stored_layer(
            configs[path].scheme.quantize(weight, configs[path]), configs[path], weight.shape, weight.dtype, spec[path].kind
        )
        if "bias" in layer:
            made.bias = layer.bias
        return made

    return map_layers(module, list(configs), make)


def trace(module: nn.Module, spec: ModelSpec, lora: LoRAConfig, train: TrainConfig, compute: Compute) -> Graph:
    """Return the graph of one optimizer step on the largest batch.

    Args:
        module: a lazy model, its layers stored as they will be.
        spec: its layers.
        lora: the adapters.
        train: the run.
        compute: how frozen layers are computed.

    Raises:
        UnsupportedError: the step cannot be built for this model.
    """
    made = attach(module, spec, lora, compute, train.grad_checkpoint)
    update = Update(made, train)
    frozen = {path: array for path, array in tree_flatten(made.parameters()) if path not in update.step.parameters}
    groups: list[tuple[str, dict[str, mx.array]]] = [
        ("weights", frozen), ("adapter", update.step.parameters), ("optimizer", update.state),
        ("gradients", update.step.parameters if train.grad_accumulation_steps > 1 else {}),
    ]  # fmt: skip
    batch = mx.zeros((train.batch_size, train.max_seq_length), mx.int32)
    flat = [array for _, group in groups for array in group.values()]

    def run(*arrays: mx.array) -> list[mx.array]:
        given = iter(arrays)
        weights, parameters, state, sums = ({path: next(given) for path in group} for _, group in groups)
        made.update(tree_unflatten(list(weights.items())))
        loss, new, kept = update(parameters, state, sums, next(given), next(given))
        return [loss, *new.values(), *kept.values()]

    records: list[dict[str, Any]] = []
    try:
        mx.export_function(records.append, run, *flat, batch, batch)
    finally:
        made.update(tree_unflatten(list(frozen.items())))
    roles = [role for role, group in groups for _ in group] + ["batch", "batch"]
    return _graph(records, roles)


def _graph(records: list[dict[str, Any]], roles: list[str]) -> Graph:
    graph, ids = Graph(), {}

    def note(name: str, shape: tuple[int, ...], itemsize: int, role: str = "") -> int:
        if name not in ids:
            ids[name] = len(ids)
            graph.arrays[ids[name]] = Array(tuple(shape), itemsize, role)
        return ids[name]

    for record in records:
        kind = record["type"]
        if kind == "inputs":
            for (name, shape, dtype), role in zip(record["inputs"], roles, strict=True):
                note(name, shape, dtype.size, role)
        elif kind == "outputs":
            graph.outputs = [note(name, shape, dtype.size) for name, shape, dtype in record["outputs"]]
        elif kind == "constants":
            for name, array in record["constants"]:
                note(name, array.shape, array.itemsize, "constant")
        elif kind == "primitive":
            sides = [tuple(note(name, shape, dtype.size) for name, shape, dtype in record[s]) for s in ("inputs", "outputs")]
            graph.nodes.append(Node(record["name"], *sides, tuple(record["arguments"])))
    return graph
