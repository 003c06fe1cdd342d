"""Reads the graph of a step that is taken a block at a time (``engine/step/blockwise.py``), its
compiled pieces put together.

Each kind of piece is read once; what a model of eighty blocks adds is arithmetic. Runs on the MLX
thread. Knows no budget.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from qlab.core.config.train import TrainConfig
from qlab.core.graph.graph import Array, Graph
from qlab.core.graph.unmerge import unmerged
from qlab.engine.memory.read_graph import read
from qlab.engine.memory.whole_step import compiled, updated
from qlab.engine.models.blocks import BlockStack
from qlab.engine.step.block import array_places, castable_parameters, half_step_parameters
from qlab.engine.step.blockwise import CHUNKS, half_step_window
from qlab.engine.step.loss import nats_and_slope
from qlab.engine.step.patches import patched, users
from qlab.engine.step.protocol import Arrays
from qlab.nn.frozen import Frozen

Function = Callable[..., list[mx.array]]


class Pieces:
    """A step taken a block at a time, to be read.

    Args:
        module: what ``attach`` returned, its arrays lazy or not; nobody else may use it.
        train: the run.
        window: blocks in flight at once.

    Raises:
        UnsupportedError: the model cannot be taken apart.
    """

    def __init__(self, module: nn.Module, train: TrainConfig, window: int) -> None:
        self.module = module
        self.train = train
        self.stack = BlockStack(module)
        self.users = users(module)
        for frozen in (x for x in module.modules() if isinstance(x, Frozen)):
            frozen.keep_dense()
        self.trained: Arrays = dict(tree_flatten(module.trainable_parameters()))
        prefix = f"{self.stack.path}."
        every = self._every = dict(tree_flatten(module.parameters()))
        self.outside: Arrays = {path: a for path, a in every.items() if not path.startswith(prefix)}
        self._own = [f"{prefix}{i}." for i in range(len(self.stack.blocks))]
        self.graph = Graph()
        self.window = window
        self.ids = {
            path: self._given(a, "adapter" if path in self.trained else "weights")
            for path, a in every.items()
        }
        self._graphs: dict[Hashable, tuple[Graph, dict[int, int]]] = {}

    def read(self) -> Graph:
        """Return the graph of the whole step."""
        try:
            return self._read()
        finally:
            self.module.update(tree_unflatten(list(self._every.items())))

    def _read(self) -> Graph:
        train = self.train
        batch = mx.zeros((train.batch_size, train.max_seq_length), mx.int32)
        self.tokens = self._given(batch, "batch")
        x, calls, kinds = self._before(batch)
        given = [self.ids[path] for path in self.trained]
        self._cast_factors(self.hidden.dtype)
        outer = [path for path in self.trained if path in self.outside]
        embeds = any(self._embeds(path) for path in outer)
        reached = [
            i
            for i, own in enumerate(self._own)
            if any(path.startswith(own) for path in self.trained)
        ]
        first = 0 if embeds else min(reached, default=len(self._own))
        kept = []
        for i, call in enumerate(calls):
            kept += [x] if i >= first else []
            (x,) = self._block(i, False, kinds[i], [x], call)
            self._ask(x)
        cotangent, grads = self._loss(x, outer)
        for i in reversed(range(first, len(calls))):
            names = [
                self._own[i] + name
                for name in _names(self.stack.blocks[i])
                if self._own[i] + name in self.trained
            ]
            cotangent, *own = self._block(i, True, kinds[i], [kept.pop(), cotangent], calls[i])
            found = dict(zip(names, own, strict=True))
            grads |= found
            half = half_step_parameters(self.stack.blocks[i], self._own[i][:-1], names)
            if half:
                self._ask(*(found.pop(name) for name in half), window=half_step_window(self.window))
            self._ask(cotangent, *found.values())
        if embeds:
            grads |= self._into(outer, cotangent, grads, batch)
        count = self._given(mx.array(0.0), "batch")
        sums = [*(grads[path] for path in self.trained), self.total, count]
        updated(self.graph, train, self.trained, given, sums)
        self._ask(*self.graph.outputs)
        return self.graph

    # --- pieces -----------------------------------------------------------------------------------

    def _before(self, batch: mx.array) -> tuple[int, list[list[int]], list[Any]]:
        """Add what comes before the blocks.

        Return its output, and for each block its other arguments and their form.
        """
        forms: list[Any] = []

        def run(tokens: mx.array, *arrays: mx.array) -> list[mx.array]:
            self._set(self.outside, arrays)
            x, calls = self.stack.before(tokens[:, :-1], tokens[:, 1:] if self.train.pack else None)
            trees = [[list(args), kwargs] for args, kwargs in calls]
            self.hidden = mx.zeros(x.shape, x.dtype)
            forms[:] = [
                tree_map(lambda a: mx.zeros(a.shape, a.dtype) if isinstance(a, mx.array) else a, t)
                for t in trees
            ]
            return [x, *(a for tree in trees for a in _leaves(tree))]

        x, *found = self._piece("before", run, [(self.tokens, batch), *self._outer()], False)
        left = iter(found)
        return x, [[next(left) for _ in _leaves(form)] for form in forms], forms

    def _cast_factors(self, dtype: mx.Dtype) -> None:
        """Go on with factors as the products take them."""
        for path in castable_parameters(
            array_places(self.module), f"{self.stack.path}.", self.trained
        ).get(dtype, ()):
            array = self.trained[path]
            if array.dtype != dtype:
                (self.ids[path],) = self._piece(
                    (path, dtype), lambda a: [a.astype(dtype)], [(self.ids[path], array)], False
                )
                self._set([path], [mx.zeros(array.shape, dtype)])

    def _block(self, i: int, back: bool, form: Any, given: list[int], call: list[int]) -> list[int]:
        """Add a block's forward pass, or its way back.

        Gradients by its input and by its trained arrays.
        """
        block = self.stack.blocks[i]
        own = self._own[i]
        arrays = dict(tree_flatten(block.parameters()))
        names = [name for name in _names(block) if name in arrays]
        arrays = {name: arrays[name] for name in names}
        chosen = [n for n, name in enumerate(names) if own + name in self.trained]
        others = _leaves(form)
        count = len(given)

        def apply(x: mx.array, mine: Sequence[mx.array], rest: Sequence[mx.array]) -> mx.array:
            left = iter(rest)
            args, kwargs = tree_map(lambda a: next(left) if isinstance(a, mx.array) else a, form)
            block.update(tree_unflatten(list(zip(names, mine, strict=True))))
            return block(x, *args, **kwargs)

        def run(*all_: mx.array) -> list[mx.array]:
            mine = list(all_[count : count + len(names)])
            rest = all_[count + len(names) :]
            if not back:
                with patched(self.users, forward=True):
                    return [apply(all_[0], mine, rest)]

            def forward(h: mx.array, *trained: mx.array) -> list[mx.array]:
                new = list(mine)
                for n, array in zip(chosen, trained, strict=True):
                    new[n] = array
                return [apply(h, new, rest)]

            with patched(self.users):
                return mx.vjp(forward, [all_[0], *(mine[n] for n in chosen)], [all_[1]])[1]

        look = tuple((name, a.shape, a.dtype) for name, a in arrays.items())
        shapes = tuple((a.shape, a.dtype) for a in others)
        key = (type(block), back, look, tuple(chosen), shapes)
        pairs = [(a, self.hidden) for a in given]
        pairs += [(self.ids[own + name], array) for name, array in arrays.items()]
        try:
            return self._piece(key, run, pairs + list(zip(call, others, strict=True)), True)
        finally:
            block.update(tree_unflatten(list(arrays.items())))

    def _loss(self, hidden: int, outer: list[str]) -> tuple[int, dict[str, int]]:
        """Add the loss, chunk by chunk.

        Return the gradients by the last hidden state and by what is trained outside.
        """
        shape = self.hidden.shape
        dtype = self.hidden.dtype
        count = shape[0] * shape[1]
        size = min(self.train.loss_chunk or count, count)
        prefix = f"{self.stack.path}."
        frozen = [
            x
            for path, x in self.module.named_modules()
            if isinstance(x, Frozen) and not path.startswith(prefix)
        ]
        heads = [x for x in frozen if not x.embeds] or frozen
        examples: list[mx.array] = []

        def dense(*arrays: mx.array) -> list[mx.array]:
            self._set(self.outside, arrays)
            found = [x.dense_if_needed(dtype) for x in heads]
            examples[:] = [mx.zeros(a.shape, a.dtype) for a in found if a is not None]
            return [
                mx.zeros((count, shape[-1]), dtype),
                mx.zeros(()),
                *(a for a in found if a is not None),
            ]

        cotangent, total, *weights = self._piece("dense", dense, self._outer(), False)
        sums = [
            self._piece(("zeros", n), lambda n=n: [mx.zeros_like(self.trained[n])], [], False)[0]
            for n in outer
        ]
        lent = list(zip(weights, examples, strict=True))
        self._ask(*weights, window=1)
        for start in range(0, count, size):
            part = min(
                size, count - start
            )  # a short last chunk is padded a little, and never the peak
            where = self._given(mx.zeros(part, mx.int32), "batch")
            made = self._chunk(part, (hidden, where, total, cotangent, *sums), outer, heads, lent)
            total, cotangent, *sums = made
            self._ask(*made, window=1 if start + size >= count else min(self.window, CHUNKS))
        self.total = total
        flat = (cotangent, mx.zeros((count, shape[-1]), dtype))
        (cotangent,) = self._piece("cotangent", lambda a: [a.reshape(shape)], [flat], False)
        return cotangent, dict(zip(outer, sums, strict=True))

    def _chunk(
        self, part: int, given: tuple[int, ...], outer: list[str], heads: list[Frozen], lent: list
    ) -> list[int]:
        """Add the loss of some positions and its gradients, and add these to the sums so far."""
        hidden, where, total, cotangent, *sums = given
        index = mx.zeros(part, mx.int32)
        width = self.hidden.shape[-1]
        rows = mx.zeros((1, part, width), self.hidden.dtype)
        ids = mx.zeros((self.train.batch_size, self.train.max_seq_length), mx.int32)

        def gather(h: mx.array, tokens: mx.array, at: mx.array) -> list[mx.array]:
            counted = tokens[:, 1:].astype(mx.float32).reshape(-1)
            return [
                h.reshape(-1, width)[at][None],
                tokens[:, 1:].reshape(-1)[at][None],
                counted[at][None],
            ]

        taken = self._piece(
            ("gather", part),
            gather,
            [(hidden, self.hidden), (self.tokens, ids), (where, index)],
            False,
        )
        pairs = list(zip(taken, (rows, index[None], index[None].astype(mx.float32)), strict=True))
        run = partial(self._slope, outer, heads, len(lent))
        loss, slope, *more = self._piece(("chunk", part), run, pairs + lent + self._outer(), True)
        flat = mx.zeros((self.hidden.size // width, width), self.hidden.dtype)

        def add(
            loss: mx.array,
            slope: mx.array,
            total: mx.array,
            sum_: mx.array,
            at: mx.array,
            *rest: mx.array,
        ) -> list:
            half = len(rest) // 2
            new = [a + b for a, b in zip(rest[:half], rest[half:], strict=True)]
            return [total + loss, sum_.at[at].add(slope[0]), *new]

        zero = mx.array(0.0)
        own = [self.trained[path] for path in outer]
        pairs = list(
            zip(
                (loss, slope, total, cotangent, where), (zero, rows, zero, flat, index), strict=True
            )
        )
        return self._piece(
            ("add", part), add, pairs + [*zip([*sums, *more], own * 2, strict=True)], False
        )

    def _slope(
        self, outer: list[str], heads: list[Frozen], count: int, *arrays: mx.array
    ) -> list[mx.array]:
        rows, labels, share, *rest = arrays
        weights = rest[:count]
        outside = dict(zip(self.outside, rest[count:], strict=True))
        lent = [x for x in heads if x.dense_if_needed(self.hidden.dtype) is not None]

        def logits(h: mx.array, *own: mx.array) -> mx.array:
            now = outside | dict(zip(outer, own, strict=True))
            with ExitStack() as stack:
                self._set(now, list(now.values()))
                for head, weight in zip(lent, weights, strict=True):
                    stack.enter_context(head.using_dense(weight))
                return self.stack.after(h)

        primals = [rows, *(outside[path] for path in outer)]
        loss, slope = nats_and_slope(logits(*primals), labels, share)
        return [loss, *mx.vjp(lambda *a: [logits(*a)], primals, [slope])[1]]

    def _into(
        self, outer: list[str], cotangent: int, grads: dict[str, int], batch: mx.array
    ) -> dict[str, int]:
        """Add the gradients by what is trained before the blocks."""
        count = len(outer)

        def run(tokens: mx.array, slope: mx.array, *arrays: mx.array) -> list[mx.array]:
            sums = arrays[:count]
            outside = dict(zip(self.outside, arrays[count:], strict=True))

            def before(*own: mx.array) -> list[mx.array]:
                now = outside | dict(zip(outer, own, strict=True))
                self._set(now, list(now.values()))
                return [
                    self.stack.before(tokens[:, :-1], tokens[:, 1:] if self.train.pack else None)[0]
                ]

            return [
                a + b
                for a, b in zip(
                    sums, mx.vjp(before, [outside[p] for p in outer], [slope])[1], strict=True
                )
            ]

        pairs = [(self.tokens, batch), (cotangent, self.hidden)]
        pairs += [(grads[path], self.trained[path]) for path in outer]
        return dict(zip(outer, self._piece("into", run, pairs + self._outer(), False), strict=True))

    # --- the graph --------------------------------------------------------------------------------

    def _piece(
        self, key: Hashable, run: Function, given: Sequence[tuple[int, mx.array]], compile_: bool
    ) -> list[int]:
        """Go on with a piece, read at its first use."""
        if key not in self._graphs:
            graph = read(run, [array for _, array in given])
            self._graphs[key] = (compiled(graph) if compile_ else unmerged(graph), {})
        graph, constants = self._graphs[key]
        return self.graph.then(graph, [a for a, _ in given], constants)

    def _ask(self, *ids: int, window: int = 0) -> None:
        self.graph.rounds.append(ids)
        self.graph.windows.append(window or self.window)

    def _given(self, array: mx.array, role: str) -> int:
        return self.graph.add(Array(array.shape, array.dtype.size, role))

    def _outer(self) -> list[tuple[int, mx.array]]:
        return [(self.ids[path], array) for path, array in self.outside.items()]

    def _set(self, names: Arrays, arrays: Sequence[mx.array]) -> None:
        self.module.update(tree_unflatten(list(zip(names, arrays, strict=True))))

    def _embeds(self, path: str) -> bool:
        owner: Any = dict(self.module.named_modules())[path.rpartition(".")[0]]
        return owner.base.embeds


def _names(block: nn.Module) -> list[str]:
    """Paths of a block's arrays in the step's order, in which its results are evaluated."""
    return [path for path, *_ in array_places(block)]


def _leaves(tree: Any) -> list[mx.array]:
    """Arrays in a tree of arguments."""
    return [a for _, a in tree_flatten(tree) if isinstance(a, mx.array)]
