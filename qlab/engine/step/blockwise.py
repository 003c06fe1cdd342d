"""One step of training, a block at a time.

One block's forward and one block's way back are compiled, and serve all alike.

Only the input of each block is kept. Each block is computed when it is handed over, at most a
window of them in flight, so that the memory in flight is chosen instead of suffered; and what is
compiled does not grow with depth. The loss is made of the positions that count, a chunk of them at
a time. The same numbers as ``WholeGraphStep``. Knows no data and no schedule.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from qlab.core.arithmetic import ceil_div
from qlab.core.config.train import TrainConfig
from qlab.engine.models.blocks import BlockStack
from qlab.engine.models.functional import Functional
from qlab.engine.step.block import Block, castable_parameters
from qlab.engine.step.loss import ShiftedBatch, nats_and_slope, shifted
from qlab.engine.step.patches import patched, users
from qlab.engine.step.protocol import Arrays, LossAndGradients, StepBatch
from qlab.engine.step.vectors import cast
from qlab.nn.frozen import Frozen
from qlab.runtime.device import backend

# blocks in flight that pay, from the fewest on (docs/adr/0006-layer-stepped.md); a single one is a
# third slower on a GPU
WINDOWS = {"cpu": (1,), "cuda": (2, 4), "metal": (2,)}
CHUNKS = 2  # of the loss in flight at most: they are large, and more of them are no faster
_PARTS = 8  # sizes of the last chunk of the loss: each is compiled once


class BlockwiseStep:
    """Loss and gradients of a model, a block at a time.

    Computes at once, so it must not be compiled or traced.

    Args:
        module: what ``attach`` returned, its arrays in memory; nobody else may use it.
        config: chunk of the loss; blocks in flight at once, 0 leaves them to the device.

    Attributes:
        parameters: trainable arrays by path.
        how: ``stepped``.
        notes: how it is computed, in words.
        traces: functions compiled so far: a few for each kind of block and each shape.
        users: see ``patches.users``.

    Raises:
        UnsupportedError: the model has no list of blocks. Whether it is no more than its blocks,
            ``make_step`` checks.
    """

    how = "stepped"

    def __init__(self, module: nn.Module, config: TrainConfig) -> None:
        self.module = module
        self.config = config
        self.traces = 0
        self.window = config.window or WINDOWS[backend()][0]
        self.parameters: Arrays = dict(tree_flatten(module.trainable_parameters()))
        self._stack = BlockStack(module)
        for frozen in (x for x in module.modules() if isinstance(x, Frozen)):
            frozen.keep_dense()  # for the moment of one block
        prefix = f"{self._stack.path}."
        self._blocks = [
            Block(block, f"{prefix}{i}", self.parameters)
            for i, block in enumerate(self._stack.blocks)
        ]
        self._outside = [path for path in self.parameters if not path.startswith(prefix)]
        self.users = users(module)
        places = Functional(module).places
        self._places = {path: (holder, key) for path, holder, key in places}
        self._keys = [
            path for path, _ in tree_flatten(module.parameters()) if path.endswith("dropout_key")
        ]
        self._followers = castable_parameters(places, prefix, self.parameters)
        self._head = _Head(self._stack, self._outside)
        self._programs: dict[Hashable, _BlockProgram] = {}
        self._different: set[int] = set()  # blocks for which it matters where they stand
        self._checked = False
        kinds = len({block.piece.form for block in self._blocks})
        self.notes = (
            f"step: {len(self._blocks)} blocks of {kinds} kind{'s' * (kinds > 1)} one by one, window {self.window}",
        )

    def __call__(self, parameters: Arrays, batch: StepBatch) -> LossAndGradients:
        """Compute loss and gradients of a batch, and return them unfinished; see ``TrainStep``."""
        if self._keys:
            if batch.key is None:
                raise ValueError("Dropout needs a key, a new one for every batch.")
            keys = mx.random.split(batch.key, len(self._keys))
            self._set(dict(zip(self._keys, keys, strict=True)))
        self._set(parameters)
        return self._compute(parameters, shifted(batch))

    def _compute(self, parameters: Arrays, batch: ShiftedBatch) -> LossAndGradients:
        counted = np.flatnonzero(
            np.array(batch.weights.reshape(-1))
        )  # before there is anything else to wait for
        x, calls = self._stack.before(batch.inputs, batch.segments)
        self._set(self._cast_factors(parameters, x.dtype))
        kinds = [self._kind(i, call, x) for i, call in enumerate(calls)]
        self._checked = True
        flight = _InFlight()
        kept = self._forward(x, kinds, flight)
        loss, cotangent, grads = self._loss(kept.pop(), batch, counted, flight)
        first = len(self._blocks) - len(kept)
        for i in reversed(range(first, len(self._blocks))):
            block = self._blocks[i]
            (kind, call) = kinds[i]
            cotangent, *own = kind.back(block, call, kept.pop(), cotangent)
            found = dict(zip(block.trained, own, strict=True))
            grads |= found
            flight.add(half_step_window(self.window), *(found.pop(path) for path in block.first))
            flight.add(self.window, cotangent, *found.values())
        self._set(parameters)
        if self._head.embeds:
            names = self._outside
            _, more = mx.vjp(
                lambda *a: self._before(a, batch), [parameters[p] for p in names], [cotangent]
            )
            grads |= {path: grads[path] + grad for path, grad in zip(names, more, strict=True)}
        return LossAndGradients(loss, grads, batch.weights.sum())

    def _cast_factors(self, parameters: Arrays, dtype: mx.Dtype) -> Arrays:
        """Return the blocks' trained factors as products will take them.

        Cast once, not on every way through a block.
        """
        return cast(parameters, dtype, self._followers.get(dtype, ()))

    def _forward(
        self, x: mx.array, kinds: list[tuple[_BlockProgram, Functional]], flight: _InFlight
    ) -> list[mx.array]:
        """Return the inputs of all blocks that a gradient reaches, and the output of the last."""
        reached = [i for i, block in enumerate(self._blocks) if block.trained]
        first = 0 if self._head.embeds else min(reached, default=len(self._blocks))
        kept = []
        for i, (block, (kind, call)) in enumerate(zip(self._blocks, kinds, strict=True)):
            if i >= first:
                kept.append(x)
            x = kind.forward(block, call, x)
            flight.add(self.window, x)
        return [*kept, x]

    def _loss(
        self, hidden: mx.array, batch: ShiftedBatch, counted: np.ndarray, flight: _InFlight
    ) -> tuple[mx.array, mx.array, Arrays]:
        """Sum of the loss, and its gradients by the last hidden state and by the parameters outside
        the blocks.
        """
        flat = hidden.reshape(-1, hidden.shape[-1])
        size = min(self.config.loss_chunk or flat.shape[0], flat.shape[0])
        targets = batch.targets.reshape(-1)
        weights = batch.weights.reshape(-1)
        drops = self._head.drops(ceil_div(counted.size, size))
        total = mx.array(0.0)
        cotangent = mx.zeros_like(flat)
        sums = [mx.zeros_like(self.parameters[path]) for path in self._outside]
        weight = self._head.weights(hidden.dtype)
        flight.add(
            1, *weight
        )  # a head may be large: no block is in flight beside it, neither before nor behind
        for n, start in enumerate(range(0, counted.size, size)):
            part = counted[start : start + size]
            full = padded_size(part.size, size, _PARTS)  # the padding counts nothing
            where = mx.array(np.pad(part, (0, max(full, part.size) - part.size)).astype(np.int32))
            share = weights[where] * (mx.arange(where.size) < part.size)
            loss, slope, *outer = self._head.run(
                self, flat[where][None], targets[where][None], share[None], weight, drops[n]
            )
            total = total + loss
            cotangent = cotangent.at[where].add(slope[0])
            sums = [a + b for a, b in zip(sums, outer, strict=True)]
            last = start + size >= counted.size
            flight.add(1 if last else min(self.window, CHUNKS), total, cotangent, *sums)
        return total, cotangent.reshape(hidden.shape), dict(zip(self._outside, sums, strict=True))

    def _kind(
        self, i: int, call: tuple[tuple, dict], x: mx.array
    ) -> tuple[_BlockProgram, Functional]:
        """Return what serves a block, and the block's other arguments."""
        block = self._blocks[i]
        piece = Functional([list(call[0]), call[1]])
        key = (block.piece.form, piece.form, i if i in self._different else None)
        kind = self._programs.setdefault(key, _BlockProgram(self, block))
        if (
            not self._checked
            and block.piece.numbered
            and kind.block is not block
            and not kind.serves(block, piece, x)
        ):
            self._different.add(i)
            return self._kind(i, call, x)
        return kind, piece

    def _before(self, arrays: Sequence[mx.array], batch: ShiftedBatch) -> list[mx.array]:
        self._set(dict(zip(self._outside, arrays, strict=True)))
        return [self._stack.before(batch.inputs, batch.segments)[0]]

    def _set(self, parameters: Arrays) -> None:
        for path, array in parameters.items():
            holder, key = self._places[path]
            holder[key] = array


def padded_size(count: int, size: int, steps: int) -> int:
    """Return the least of ``steps`` even sizes up to ``size`` that holds ``count``.

    So a chunk of any length is padded to one of few lengths, each of which is compiled once.

    Example:
        >>> padded_size(130, 512, steps=8), padded_size(500, 512, steps=8)
        (192, 512)
    """
    return ceil_div(count * steps, size) * size // steps


def half_step_window(window: int) -> int:
    """Return the window that holds between the two halves of a way back.

    For its own first half no block waits.

    A half holds as much as a block on the way forward, and counts as one.
    """
    return max(window, 2)


class _InFlight:
    """Hands arrays over to be computed, and waits so that not too much is unfinished."""

    def __init__(self) -> None:
        self._unfinished: deque[mx.array] = deque()

    def add(self, window: int, *arrays: mx.array) -> None:
        """Hand over what belongs together, and wait until fewer than ``window`` such handfuls are
        unfinished.
        """
        if arrays:
            mx.async_eval(arrays)
            self._unfinished.append(arrays[0])
        while len(self._unfinished) >= window:
            mx.eval(self._unfinished.popleft())


class _BlockProgram:
    """What blocks that differ in their arrays only have in common.

    A forward pass and a way back, each compiled once.
    """

    def __init__(self, step: BlockwiseStep, block: Block) -> None:
        self.block = block
        self._step = step
        self._call: Functional | None = (
            None  # whatever is no array in it is the same for all calls of this kind
        )
        self._forward = mx.compile(self._run)
        self._back = mx.compile(self._way_back)

    def forward(self, block: Block, call: Functional, x: mx.array) -> mx.array:
        """Return the block's output."""
        self._call = call
        return self._forward(x, block.piece.arrays, call.arrays)

    def back(
        self, block: Block, call: Functional, x: mx.array, cotangent: mx.array
    ) -> list[mx.array]:
        """Return the gradients by the block's input and by its trained arrays.

        Its output is computed again.
        """
        self._call = call
        return self._back(x, cotangent, block.piece.arrays, call.arrays)

    def serves(self, block: Block, call: Functional, x: mx.array) -> bool:
        """Whether another block computes the same, tried out on ``x``."""
        args, kwargs = call.root
        with self.block.piece.using(block.piece.arrays):
            found = self.block.piece.root(x, *args, **kwargs)
        return mx.array_equal(found, block.piece.root(x, *args, **kwargs)).item()

    def _run(self, x: mx.array, arrays: list[mx.array], others: list[mx.array]) -> mx.array:
        self._step.traces += 1
        with patched(self._step.users, forward=True):
            return self._apply(x, arrays, others)

    def _way_back(
        self, x: mx.array, cotangent: mx.array, arrays: list[mx.array], others: list[mx.array]
    ) -> list[mx.array]:
        self._step.traces += 1
        chosen = self.block.chosen

        def run(h: mx.array, *own: mx.array) -> list[mx.array]:
            all_ = list(arrays)
            for n, array in zip(chosen, own, strict=True):
                all_[n] = array
            return [self._apply(h, all_, others)]

        with patched(self._step.users):
            return mx.vjp(run, [x, *(arrays[n] for n in chosen)], [cotangent])[1]

    def _apply(self, x: mx.array, arrays: list[mx.array], others: list[mx.array]) -> mx.array:
        with self.block.piece.using(arrays), self._call.using(others):
            args, kwargs = self._call.root
            return self.block.piece.root(x, *args, **kwargs)


class _Head:
    """What comes after the blocks: the loss of a chunk of positions and its gradients, compiled.

    Attributes:
        embeds: whether a trained array is needed before the blocks, too.
    """

    def __init__(self, stack: BlockStack, trained: list[str]) -> None:
        self._stack = stack
        self._piece = Functional(stack.module, without=stack.block_list)
        names = [name for name, *_ in self._piece.places]
        self._chosen = [names.index(path) for path in trained]
        self._dropped = [n for n, name in enumerate(names) if name.endswith("dropout_key")]
        frozen = [
            x
            for path, x in stack.module.named_modules()
            if isinstance(x, Frozen) and not path.startswith(stack.path)
        ]
        linear = [x for x in frozen if not x.embeds]
        self._heads = linear or frozen
        self.embeds = any(_owner(stack.module, path).base.embeds for path in trained)
        self._compiled: Callable[..., Any] = mx.compile(self._chunk)
        self._step: BlockwiseStep | None = None

    def weights(self, dtype: mx.Dtype) -> list[mx.array]:
        """Return the dense weights of the heads that need one, lazily; they serve all chunks."""
        found = [(head, head.dense_if_needed(dtype)) for head in self._heads]
        self._lent = [head for head, weight in found if weight is not None]
        return [weight for _, weight in found if weight is not None]

    def drops(self, chunks: int) -> list[list[mx.array]]:
        """Return the dropout keys of every chunk: each drops inputs of its own."""
        own = [self._piece.arrays[n] for n in self._dropped]
        split = [mx.random.split(key, chunks) if chunks > 1 else [key] for key in own]
        return [[keys[i] for keys in split] for i in range(max(chunks, 1))]

    def run(
        self,
        step: BlockwiseStep,
        rows: Any,
        labels: Any,
        share: Any,
        weights: list[mx.array],
        drops: list[mx.array],
    ) -> Any:
        """Return the loss, its gradient by ``rows`` ``(1, n, width)``, and those by the trained
        arrays.
        """
        self._step = step
        arrays = self._piece.arrays
        for n, key in zip(self._dropped, drops, strict=True):
            arrays[n] = key
        return self._compiled(rows, labels, share, arrays, weights)

    def _chunk(
        self,
        rows: mx.array,
        labels: mx.array,
        share: mx.array,
        arrays: list[mx.array],
        weights: list[mx.array],
    ) -> Any:
        self._step.traces += 1

        def logits(h: mx.array, *own: mx.array) -> mx.array:
            all_ = list(arrays)
            for n, array in zip(self._chosen, own, strict=True):
                all_[n] = array
            with ExitStack() as stack:
                stack.enter_context(self._piece.using(all_))
                for head, weight in zip(self._lent, weights, strict=True):
                    stack.enter_context(head.using_dense(weight))
                return self._stack.after(h)

        primals = [rows, *(arrays[n] for n in self._chosen)]
        loss, slope = nats_and_slope(logits(*primals), labels, share)
        return [loss, *mx.vjp(lambda *a: [logits(*a)], primals, [slope])[1]]


def _owner(module: nn.Module, path: str) -> Any:
    from qlab.engine.models.surgery import module_at

    return module_at(module, path.rpartition(".")[0])
