"""The blockwise step: loss and gradients of a batch, a block at a time.

One block's forward pass and one block's backward pass are compiled, and serve all blocks alike, so
what is compiled does not grow with depth. Only the input of each block is cached. Blocks are handed
over to the device while the step runs, and ``window`` bounds how many unfinished blocks hold
memory. The loss is made of the positions that count, a chunk of them at a time.

The same numbers as ``WholeGraphStep``, whose file has a table of what mirrors what in this file,
in that one and in ``memory/blockwise_step.py``: the three change together. The numbers in comments
are those of the table. Chosen by ``make_step``; docs/adr/0006-layer-stepped.md says why.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from qlab.core.arithmetic import ceil_div
from qlab.core.config.train import TrainConfig
from qlab.engine.models.blocks import BlockCall, BlockStack
from qlab.engine.models.functional import Functional
from qlab.engine.step.block import Block, array_places, castable_parameters
from qlab.engine.step.head import Chunk, Head
from qlab.engine.step.loss import ShiftedBatch, shifted
from qlab.engine.step.patches import call_sites
from qlab.engine.step.program import BlockProgram, PlannedBlock
from qlab.engine.step.protocol import Arrays, LossAndGradients, StepBatch
from qlab.engine.step.vectors import cast
from qlab.nn.frozen import Frozen
from qlab.runtime.device import backend

# blocks in flight that pay, from the fewest on (docs/adr/0006-layer-stepped.md); a single one is a
# third slower on a GPU
WINDOWS = {"cpu": (1,), "cuda": (2, 4), "metal": (2,)}
CHUNKS = 2  # of the loss in flight at most: they are large, and more of them are no faster
_LAST_CHUNK_SIZES = 8  # the last chunk is padded to one of so many sizes; each is compiled once


class BlockwiseStep:
    """Loss and gradients of a model, a block at a time. A ``TrainStep``.

    It evaluates arrays while it is called, so it must not be compiled or traced itself.

    Args:
        module: what ``attach`` returned, its arrays in memory; the step must be its only user.
        config: chunk of the loss; blocks in flight at once, 0 leaves them to the device.

    Attributes:
        module: the model with its adapters.
        config: the run.
        parameters: trainable arrays by path.
        how: ``stepped``.
        notes: how it is computed, in words.
        traces: functions compiled so far: a few for each kind of block and each shape.
        call_sites: see ``patches.call_sites``.
        window: blocks in flight at once.

    Raises:
        UnsupportedError: the model has no list of blocks. Whether it is no more than its blocks,
            ``make_step`` checks.
    """

    def __init__(self, module: nn.Module, config: TrainConfig) -> None:
        self.module = module
        self.config = config
        self.how = "stepped"
        self.traces = 0
        self.window = config.window or WINDOWS[backend()][0]
        self.parameters: Arrays = dict(tree_flatten(module.trainable_parameters()))
        self.call_sites = call_sites(module)
        self._stack = BlockStack(module)
        for layer in module.modules():
            if isinstance(layer, Frozen):
                layer.keep_dense()  # for the moment of one block
        prefix = f"{self._stack.path}."
        self._blocks = []
        for i, block in enumerate(self._stack.blocks):
            self._blocks.append(Block(block, f"{prefix}{i}", self.parameters))
        self._outside = [path for path in self.parameters if not path.startswith(prefix)]
        places = array_places(module)
        self._places = {place.path: place for place in places}
        every = dict(tree_flatten(module.parameters()))
        self._dropout_paths = [path for path in every if path.endswith("dropout_key")]
        self._castable = castable_parameters(places, prefix, self.parameters)
        self._head = Head(self._stack, self._outside, self._count_trace)
        self._programs: dict[Hashable, BlockProgram] = {}
        self._different: set[int] = set()  # blocks whose output depends on their position
        self._checked = False
        self.notes = (self._note(),)

    def __call__(self, parameters: Arrays, batch: StepBatch) -> LossAndGradients:
        """Compute loss and gradients of a batch, and return them unfinished; see ``TrainStep``."""
        if self._dropout_paths:
            if batch.key is None:
                raise ValueError("Dropout needs a key, a new one for every batch.")
            keys = mx.random.split(batch.key, len(self._dropout_paths))
            self._set(dict(zip(self._dropout_paths, keys, strict=True)))
        self._set(parameters)
        return self._compute(parameters, shifted(batch))

    def _compute(self, parameters: Arrays, batch: ShiftedBatch) -> LossAndGradients:
        # waits for the weights now, before there is anything else to wait for
        counted = np.flatnonzero(np.array(batch.weights.reshape(-1)))
        x, calls = self._stack.before(batch.inputs, batch.segments)  # 1; (batch, length, hidden)
        self._set(self._cast_factors(parameters, x.dtype))  # 2
        plans = [self._plan(i, call, x) for i, call in enumerate(calls)]
        self._checked = True
        flight = _InFlight()
        # popped while they are used, so that each is let go once its block is done
        states = self._forward(x, plans, flight)  # 3
        loss, cotangent, grads = self._loss(states.pop(), batch, counted, flight)  # 4
        first = len(plans) - len(states)
        for plan in reversed(plans[first:]):  # 5
            cotangent, *own = plan.backward(states.pop(), cotangent)
            block_grads = dict(zip(plan.block.trained, own, strict=True))
            grads |= block_grads
            half = [block_grads.pop(path) for path in plan.block.half_step]
            flight.add(half_step_window(self.window), *half)
            flight.add(self.window, cotangent, *block_grads.values())
        self._set(parameters)
        if self._head.embeds:  # 6
            primals = [parameters[path] for path in self._outside]

            def before(*arrays: mx.array) -> list[mx.array]:
                return self._before(arrays, batch)

            _, more = mx.vjp(before, primals, [cotangent])
            for path, grad in zip(self._outside, more, strict=True):
                grads[path] = grads[path] + grad
        return LossAndGradients(loss, grads, batch.weights.sum())

    def _cast_factors(self, parameters: Arrays, dtype: mx.Dtype) -> Arrays:
        """Return the blocks' trained factors in the dtype in which products take them.

        Cast once a step, not in every pass through a block.
        """
        return cast(parameters, dtype, self._castable.get(dtype, ()))

    def _forward(self, x: mx.array, plans: list[PlannedBlock], flight: _InFlight) -> list[mx.array]:
        """Return the inputs of all blocks that a gradient reaches, and the output of the last.

        Each is ``(batch, length, hidden)``.
        """
        reached = [i for i, block in enumerate(self._blocks) if block.trained]
        first = min(reached, default=len(self._blocks))
        if self._head.embeds:
            first = 0
        states = []
        for i, plan in enumerate(plans):
            if i >= first:
                states.append(x)
            x = plan.forward(x)
            flight.add(self.window, x)
        return [*states, x]

    def _loss(
        self, hidden: mx.array, batch: ShiftedBatch, counted: np.ndarray, flight: _InFlight
    ) -> tuple[mx.array, mx.array, Arrays]:
        """Return the loss, and its gradients by the last hidden state and outside the blocks.

        Args:
            hidden: ``(batch, length, hidden)``.
            batch: targets and weights.
            counted: numbers of the flattened positions whose target counts.
            flight: what is unfinished.
        """
        flat = hidden.reshape(-1, hidden.shape[-1])  # (positions, hidden)
        targets = batch.targets.reshape(-1)
        weights = batch.weights.reshape(-1)
        positions = flat.shape[0]
        size = min(self.config.loss_chunk or positions, positions)
        dropout_keys = self._head.dropout_keys(ceil_div(counted.size, size))
        total = mx.array(0.0)
        cotangent = mx.zeros_like(flat)
        sums = [mx.zeros_like(self.parameters[path]) for path in self._outside]
        dense_weights = self._head.weights(hidden.dtype)
        # a head may be large: no block is in flight beside it, neither before nor behind
        flight.add(1, *dense_weights)
        for n, start in enumerate(range(0, counted.size, size)):
            part = counted[start : start + size]
            padding = padded_size(part.size, size, _LAST_CHUNK_SIZES) - part.size
            padded = np.pad(part, (0, padding))
            where = mx.array(padded.astype(np.int32))
            share = weights[where] * (mx.arange(where.size) < part.size)  # padding counts nothing
            # the chunk has no name here, so that its rows are let go once they are used
            loss, slope, *outer = self._head.loss_and_gradients(
                Chunk(flat[where][None], targets[where][None], share[None]),
                dense_weights,
                dropout_keys[n],
            )
            total = total + loss
            cotangent = cotangent.at[where].add(slope[0])
            sums = [a + b for a, b in zip(sums, outer, strict=True)]
            last = start + size >= counted.size
            window = 1 if last else min(self.window, CHUNKS)
            flight.add(window, total, cotangent, *sums)
        by_outside = dict(zip(self._outside, sums, strict=True))
        return total, cotangent.reshape(hidden.shape), by_outside

    def _plan(self, i: int, call: BlockCall, x: mx.array) -> PlannedBlock:
        """Return what computes a block: the program of its kind, which may be made here.

        Args:
            i: number of the block.
            call: its other arguments.
            x: an input, to try out whether the block's output depends on its position.
        """
        block = self._blocks[i]
        arguments = Functional([list(call.args), call.kwargs])
        place = i if i in self._different else None
        kind = (block.functional.form, arguments.form, place)
        if kind not in self._programs:
            self._programs[kind] = BlockProgram(block, self.call_sites, self._count_trace)
        program = self._programs[kind]
        another = program.block is not block
        untried = another and block.functional.numbered and not self._checked
        if untried and not program.serves(block, arguments, x):
            self._different.add(i)
            return self._plan(i, call, x)
        return PlannedBlock(block, program, arguments)

    def _before(self, arrays: Sequence[mx.array], batch: ShiftedBatch) -> list[mx.array]:
        """Return the first block's input as a function of the arrays outside the blocks."""
        self._set(dict(zip(self._outside, arrays, strict=True)))
        return [self._stack.before(batch.inputs, batch.segments)[0]]

    def _set(self, arrays: Arrays) -> None:
        """Put arrays by path into the model."""
        for path, array in arrays.items():
            place = self._places[path]
            place.holder[place.key] = array

    def _count_trace(self) -> None:
        self.traces += 1

    def _note(self) -> str:
        kinds = len({block.functional.form for block in self._blocks})
        plural = "s" * (kinds > 1)
        return (
            f"step: {len(self._blocks)} blocks of {kinds} kind{plural} one by one, "
            f"window {self.window}"
        )


def padded_size(count: int, size: int, steps: int) -> int:
    """Return the least of ``steps`` even sizes up to ``size`` that holds ``count``.

    So a chunk of any length is padded to one of few lengths, each of which is compiled once.

    Example:
        >>> padded_size(130, 512, steps=8), padded_size(500, 512, steps=8)
        (192, 512)
    """
    return ceil_div(count * steps, size) * size // steps


def half_step_window(window: int) -> int:
    """Return the window that holds between the two halves of a block's backward pass.

    A half holds as much memory as a block in the forward pass, and counts as one of the window. At
    least two, so that no block waits for its own first half.
    """
    return max(window, 2)


class _InFlight:
    """Hands arrays over to be computed, and waits so that not too much is unfinished."""

    def __init__(self) -> None:
        self._unfinished: deque[mx.array] = deque()

    def add(self, window: int, *arrays: mx.array) -> None:
        """Hand over a group of arrays; wait until fewer than ``window`` groups are unfinished."""
        if arrays:
            mx.async_eval(arrays)
            self._unfinished.append(arrays[0])
        while len(self._unfinished) >= window:
            mx.eval(self._unfinished.popleft())
