"""Adds the optimizer's update to the graph of a step's gradients.

Mirrors what the training loop does with them (``engine/train/loop.py``): add up the batches of a
step, ``Update.gather``, ``Update.__call__``. ``whole_step`` and ``blockwise_step`` end with it.
Runs on the MLX thread. Computes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from qlab.core.config.train import TrainConfig
from qlab.core.graph.graph import Array, Graph
from qlab.core.graph.unmerge import unmerged
from qlab.engine.memory.read_graph import compiled, read
from qlab.engine.step.protocol import Arrays, LossAndGradients
from qlab.engine.train.update import FlatGradients, Update


@dataclass(frozen=True)
class SumIds:
    """Ids of what one batch adds up to.

    Attributes:
        grads: gradients, in the order of the trained arrays.
        loss: summed loss.
        count: number of targets.
    """

    grads: list[int]
    loss: int
    count: int


def add_update(
    graph: Graph, train: TrainConfig, trained: Arrays, parameters: Sequence[int], sums: SumIds
) -> None:
    """Go on from a batch's gradients to the new parameters, which become the graph's outputs.

    Args:
        graph: of one batch.
        train: the run's settings.
        trained: trained arrays by path; may be lazy.
        parameters: ids of these arrays, in that order.
        sums: what the batch adds up to.
    """
    _Update(graph, train, trained).add(parameters, sums)


class _Update:
    def __init__(self, graph: Graph, train: TrainConfig, trained: Arrays) -> None:
        self._graph = graph
        self._train = train
        self._trained = trained
        self._update = Update(train, trained)
        self._number = mx.array(0.0)  # stands for any single float32

    def add(self, parameters: Sequence[int], sums: SumIds) -> None:
        if self._train.grad_accumulation_steps > 1:
            sums = self._accumulated(sums)
        gathered, joined = self._gathered(sums)
        handed_over = [*gathered, sums.loss, sums.count]
        self._graph.hand_over(handed_over, window=1)
        # the loop holds them until the new parameters are there
        self._graph.held += handed_over
        self._graph.outputs = self._updated(parameters, handed_over, joined)

    def _accumulated(self, sums: SumIds) -> SumIds:
        """Add a batch to the batches before it, whose sums are in memory."""
        examples = [*self._trained.values(), self._number, self._number]
        earlier = [self._input(example, "gradients") for example in examples]
        newest = [*sums.grads, sums.loss, sums.count]
        half = len(examples)

        def plus(*arrays: mx.array) -> list[mx.array]:
            old_sums = arrays[:half]
            new_sums = arrays[half:]
            pairs = zip(old_sums, new_sums, strict=True)
            return [old + new for old, new in pairs]

        addition = read(plus, examples * 2)
        piece = unmerged(addition)
        inputs = [*earlier, *newest]
        *grads, loss, count = self._graph.then(piece, inputs, {})
        return SumIds(grads, loss, count)

    def _gathered(self, sums: SumIds) -> tuple[list[int], Arrays]:
        """Join the gradients as the optimizer takes them, and take their norm.

        Returns:
            Ids of the joined gradients and their norm; lazy arrays like the joined gradients, by
            name.
        """
        example_grads = self._example_grads(sums)

        def gather(*arrays: mx.array) -> list[mx.array]:
            pairs = zip(self._trained, arrays, strict=True)
            grads = dict(pairs)
            gathered = self._gather(grads)
            return [*gathered.grads.values(), gathered.norm]

        joined = self._gather(example_grads).grads
        examples = list(example_grads.values())
        piece = compiled(read(gather, examples))
        gathered_ids = self._graph.then(piece, sums.grads, {}, "gradients")
        return gathered_ids, joined

    def _example_grads(self, sums: SumIds) -> Arrays:
        """Lazy arrays like the gradients: in the parameters' dtypes, or in half as many bytes."""
        grads = {}
        pairs = zip(self._trained.items(), sums.grads, strict=True)
        for (path, array), grad_id in pairs:
            dtype = array.dtype
            itemsize = self._graph.arrays[grad_id].itemsize
            if itemsize != dtype.size:
                dtype = mx.bfloat16
            grads[path] = array.astype(dtype)
        return grads

    def _gather(self, grads: Arrays) -> FlatGradients:
        loss = self._number
        count = self._number
        sums = LossAndGradients(loss, grads, count)
        return self._update.gather(sums)

    def _updated(
        self, parameters: Sequence[int], handed_over: list[int], joined: Arrays
    ) -> list[int]:
        """Add the optimizer's update.

        Args:
            parameters: ids of the trained arrays.
            handed_over: ids of joined gradients, norm, loss and count.
            joined: lazy arrays like the joined gradients, by name.

        Returns:
            Ids of the new parameters and state, and of what the loop reports.
        """
        update = self._update
        flat = update.flat(self._trained)
        state = update.state

        def run(*arrays: mx.array) -> list[mx.array]:
            left = iter(arrays)
            old = {name: next(left) for name in flat}
            moments = {name: next(left) for name in state}
            grads = {name: next(left) for name in joined}
            norm, loss, count, rate = left
            gathered = FlatGradients(grads, norm, loss, count)
            parameters = update.by_path(old)
            new = update(parameters, moments, gathered, rate)
            new_flat = update.flat(new.parameters)
            reported = [new.loss, new.grad_norm, new.finite]
            return [*new_flat.values(), *new.state.values(), *reported]

        states = [self._input(array, "optimizer") for array in state.values()]
        current = list(parameters)
        if flat is not self._trained:
            current = self._vectors(flat)
        rate = self._input(self._number, "batch")
        numbers = [self._number] * 4  # norm, loss, count, learning rate
        examples = [*flat.values(), *state.values(), *joined.values(), *numbers]
        piece = compiled(read(run, examples))
        inputs = [*current, *states, *handed_over, rate]
        return self._graph.then(piece, inputs, {}, "gradients")

    def _vectors(self, flat: Arrays) -> list[int]:
        """Add the vectors whose views the trained arrays are: their bytes are there once."""
        views = [Array(array.shape, 0, "adapter") for array in flat.values()]
        return [self._graph.add(view) for view in views]

    def _input(self, array: mx.array, role: str) -> int:
        itemsize = array.dtype.size
        node = Array(array.shape, itemsize, role)
        return self._graph.add(node)
