"""Reads the graph of a training step without computing it.

From a config alone, for every architecture of mlx-lm.

Knows no budget. Runs on the MLX thread.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from qlab.core.config.train import TrainConfig
from qlab.core.graph.fusion import fused
from qlab.core.graph.graph import Array, Graph
from qlab.core.graph.unmerge import unmerged
from qlab.engine.memory.read_graph import read
from qlab.engine.step.protocol import Arrays, LossAndGradients, StepBatch
from qlab.engine.step.whole import WholeGraphStep
from qlab.engine.train.update import FlatGradients, Update
from qlab.runtime.device import backend


def whole(module: nn.Module, train: TrainConfig) -> Graph:
    """Return the graph of one optimizer step on the largest batch, taken as one.

    Args:
        module: what ``attach`` returned, its arrays lazy or not; nobody else may use it.
        train: the run.

    Raises:
        UnsupportedError: the step cannot be built for this model, or cannot be read.
    """
    step = WholeGraphStep(module, train)
    if backend() != "cpu":
        _mark(step)
    frozen = {
        path: array
        for path, array in tree_flatten(module.parameters())
        if path not in step.parameters
    }
    batch = mx.zeros((train.batch_size, train.max_seq_length), mx.int32)
    roles = ["weights"] * len(frozen) + ["adapter"] * len(step.parameters) + ["batch"] * 3

    def run(*arrays: mx.array) -> list[mx.array]:
        given = iter(arrays)
        weights, parameters = (
            {path: next(given) for path in group} for group in (frozen, step.parameters)
        )
        tokens, mask, key = given
        module.update(tree_unflatten(list(weights.items())))
        own = {
            path: mx.depends([a], [key])[0] for path, a in parameters.items()
        }  # differentiation copies what it starts from
        segments = tokens if train.pack else None
        found = step(own, StepBatch(tokens, mask, key, segments))
        return [found.loss, found.count, *found.grads.values()]

    try:
        graph = read(
            run,
            [*frozen.values(), *step.parameters.values(), batch, batch, mx.random.key(0)],
            roles,
        )
    finally:
        module.update(tree_unflatten(list(frozen.items())))
    graph = compiled(graph).needed() if backend() == "cpu" else unmerged(graph, graph.outputs[0])
    loss, count, *grads = graph.outputs
    updated(graph, train, step.parameters, graph.inputs[len(frozen) : -3], [*grads, loss, count])
    graph.rounds.append(tuple(graph.outputs))
    graph.windows.append(1)
    return graph


def _mark(step: WholeGraphStep) -> None:
    """Keep the two passes behind the blocks, one for the loss and one for its gradients, from being
    merged by reading.

    Compilation would merge them, too.
    """
    if step.stack is None:
        return
    after = step.stack.after
    numbers = itertools.count()
    step.stack.after = lambda hidden: after(
        mx.depends([hidden], [mx.array(float(next(numbers)))])[0]
    )


def updated(
    graph: Graph, train: TrainConfig, trained: Arrays, ids: Sequence[int], sums: list[int]
) -> None:
    """Go on with the update as the training loop does, ask for what it asks for, and hold what it
    holds on to meanwhile.

    Args:
        graph: of one batch.
        train: the run.
        trained: arrays by path.
        ids: of these arrays, there.
        sums: ids of what the batch adds up to: the gradients, the loss and the number of targets.
    """
    number = mx.array(0.0)
    update = Update(train, trained)
    kept = update.kept(trained)
    first = update.state
    examples = [*trained.values(), number, number]
    if train.grad_accumulation_steps > 1:
        half = len(sums)
        earlier = [_given(graph, a, "gradients") for a in examples]
        plus = unmerged(
            read(lambda *a: [x + y for x, y in zip(a[:half], a[half:], strict=True)], examples * 2)
        )
        sums = graph.then(plus, [*earlier, *sums], {})

    def gather(*grads: mx.array) -> list[mx.array]:
        found = update.gather(
            LossAndGradients(number, dict(zip(trained, grads, strict=True)), number)
        )
        return [*found.grads.values(), found.norm]

    def run(*arrays: mx.array) -> list[mx.array]:
        given = iter(arrays)
        own, state, grads = (
            {name: next(given) for name in group} for group in (kept, first, joined)
        )
        norm, loss, count, rate = given
        new = update(update.by_path(own), state, FlatGradients(grads, norm, loss, count), rate)
        return [
            *update.kept(new.parameters).values(),
            *new.state.values(),
            new.loss,
            new.grad_norm,
            new.finite,
        ]

    *grads, loss, count = sums
    pairs = zip(trained.items(), (graph.arrays[a].itemsize for a in grads), strict=True)
    slopes = {
        path: a.astype(a.dtype if size == a.dtype.size else mx.bfloat16)
        for (path, a), size in pairs
    }  # never computed
    joined = update.gather(LossAndGradients(number, slopes, number)).grads
    gathered = graph.then(compiled(read(gather, [*slopes.values()])), grads, {}, "gradients")
    graph.rounds.append((*gathered, loss, count))
    graph.windows.append(1)
    states = [_given(graph, a, "optimizer") for a in first.values()]
    # arrays that are views of vectors are there once
    own = (
        ids if kept is trained else [graph.add(Array(a.shape, 0, "adapter")) for a in kept.values()]
    )
    given = [*own, *states, *gathered, loss, count, _given(graph, number, "batch")]
    graph.held += [*gathered, loss, count]
    examples = [*kept.values(), *first.values(), *joined.values(), number, number, number, number]
    graph.outputs = graph.then(compiled(read(run, examples)), given, {}, "gradients")


def compiled(graph: Graph) -> Graph:
    """Return a graph as it is after compilation here.

    On the CPU MLX calls a compiler, and does without where there is none.
    """
    return fused(graph) if backend() != "cpu" or shutil.which("g++") is not None else graph


def _given(graph: Graph, array: mx.array, role: str) -> int:
    return graph.add(Array(array.shape, array.dtype.size, role))
