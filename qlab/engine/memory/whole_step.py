"""Reads the graph of a whole-graph step without computing it; ``Forecast`` simulates its memory.

From a config alone, for every architecture of mlx-lm. The step is ``engine/step/whole.py``; the
graph of a blockwise one is put together in ``blockwise_step.py``. Runs on the MLX thread. Knows no
budget.
"""

from __future__ import annotations

import itertools

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from qlab.core.config.train import TrainConfig
from qlab.core.graph.graph import Graph
from qlab.core.graph.unmerge import unmerged
from qlab.engine.memory.read_graph import compiled, read
from qlab.engine.memory.update_graph import SumIds, add_update
from qlab.engine.step.protocol import Arrays, StepBatch
from qlab.engine.step.whole import WholeGraphStep
from qlab.runtime.device import backend


def whole(module: nn.Module, train: TrainConfig) -> Graph:
    """Return the graph of one optimizer step on the largest batch, taken as one graph.

    Args:
        module: what ``attach`` returned, its arrays lazy or not; must have no other user.
        train: the run's settings.

    Raises:
        UnsupportedError: the step cannot be built for this model, or cannot be read.
    """
    step = WholeGraphStep(module, train)
    if backend() != "cpu":
        _keep_passes_apart(step)
    parameters: Arrays = dict(tree_flatten(module.parameters()))
    frozen = {path: array for path, array in parameters.items() if path not in step.parameters}
    try:
        graph = _read(step, module, train, frozen)
    finally:
        module.update(tree_unflatten(list(frozen.items())))

    # the CPU's step is compiled, others evaluate it operation by operation
    if backend() == "cpu":
        graph = compiled(graph).needed()
    else:
        graph = unmerged(graph, loss=graph.outputs[0])
    loss, count, *grads = graph.outputs
    trained = graph.inputs[len(frozen) : len(parameters)]
    add_update(graph, train, step.parameters, trained, SumIds(grads, loss, count))
    graph.hand_over(graph.outputs, window=1)
    return graph


def _read(step: WholeGraphStep, module: nn.Module, train: TrainConfig, frozen: Arrays) -> Graph:
    """Return the graph from a model's arrays and a batch to loss, number of targets and gradients.

    Inputs are the frozen arrays, the trained ones, tokens, mask and key.
    """

    def run(*arrays: mx.array) -> list[mx.array]:
        left = iter(arrays)
        weights = {path: next(left) for path in frozen}
        parameters = {path: next(left) for path in step.parameters}
        tokens, mask, key = left
        module.update(tree_unflatten(list(weights.items())))
        # ``vjp`` of mlx/transforms.cpp differentiates by copies of the arrays that it is given
        copies = {}
        for path, array in parameters.items():
            (copies[path],) = mx.depends([array], [key])
        segments = tokens if train.pack else None
        sums = step(copies, StepBatch(tokens, mask, key, segments))
        return [sums.loss, sums.count, *sums.grads.values()]

    tokens = mx.zeros((train.batch_size, train.max_seq_length), mx.int32)
    batch = [tokens, tokens, mx.random.key(0)]  # the mask is as large as the tokens
    arrays = [*frozen.values(), *step.parameters.values(), *batch]
    roles = ["weights"] * len(frozen)
    roles += ["adapter"] * len(step.parameters)
    roles += ["batch"] * len(batch)
    return read(run, arrays, roles)


def _keep_passes_apart(step: WholeGraphStep) -> None:
    """Keep the step's two passes behind the blocks from being merged by reading.

    One is for the loss, one for its gradients; they are equal, and evaluated both where the step is
    not compiled. So each waits for another number.
    """
    if step.stack is None:
        return
    after = step.stack.after
    numbers = itertools.count()

    def marked(hidden: mx.array) -> mx.array:
        number = mx.array(float(next(numbers)))
        return after(mx.depends([hidden], [number])[0])

    step.stack.after = marked
