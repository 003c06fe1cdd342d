"""The loss of a blockwise step as a graph: chunk by chunk, with its gradients.

Mirrors ``BlockwiseStep._loss`` and ``_Head`` of ``engine/step/blockwise.py``; ``BlockwiseGraph``
calls it between the blocks' forward and backward passes. Runs on the MLX thread.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import NamedTuple

import mlx.core as mx

from qlab.engine.memory.graph_pieces import Outputs, PieceGraph, Placed
from qlab.engine.memory.split_model import SplitModel
from qlab.engine.step.blockwise import CHUNKS
from qlab.engine.step.loss import nats_and_slope
from qlab.nn.frozen import Frozen


class LossSums(NamedTuple):
    """What the chunks of a loss add up to.

    Attributes:
        total: summed loss, float32 ``()``.
        cotangent: gradient by the last hidden state. ``(batch · tokens, width)`` while chunks are
            added to it, ``(batch, tokens, width)`` at the end.
        grads: gradients by the trained arrays outside the blocks, in the order of
            ``trained_outside``.
    """

    total: Placed
    cotangent: Placed
    grads: list[Placed]

    @property
    def arrays(self) -> list[Placed]:
        """All of them, in the order in which the step hands them over."""
        return [self.total, self.cotangent, *self.grads]


class LossGraph:
    """Adds the loss of a step to its graph.

    Args:
        model: the model.
        pieces: the graph.
        tokens: the batch, ``(batch, length)`` integers.
        hidden: output of the last block, ``(batch, length − 1, width)``.
        window: blocks in flight at once.
    """

    def __init__(
        self,
        model: SplitModel,
        pieces: PieceGraph,
        tokens: Placed,
        hidden: Placed,
        window: int,
    ) -> None:
        self._model = model
        self._pieces = pieces
        self._tokens = tokens
        self._hidden = hidden
        self._window = window
        self._dtype = hidden.like.dtype
        self._width = hidden.like.shape[-1]
        self._positions = hidden.like.size // self._width
        # heads whose weight is dequantized once, for all chunks
        self._dense_heads: list[Frozen] = []

    def add(self) -> LossSums:
        """Add the loss and return its sum and gradients."""
        positions = self._positions
        loss_chunk = self._model.train.loss_chunk or positions
        size = min(loss_chunk, positions)
        sums, weights = self._start()
        # a head may be large: no block is in flight beside it
        self._pieces.hand_over(weights, window=1)
        for start in range(0, positions, size):
            # the step pads a short last chunk a little; it is never the peak
            left = positions - start
            count = min(size, left)
            sums = self._chunk(count, sums, weights)
            window = min(self._window, CHUNKS)
            if left <= size:
                window = 1
            self._pieces.hand_over(sums.arrays, window)
        return self._in_rows(sums)

    def _in_rows(self, sums: LossSums) -> LossSums:
        """Give the gradient by the hidden state the shape of the hidden state."""
        shape = self._hidden.like.shape

        def in_rows(flat: mx.array) -> Outputs:
            return [flat.reshape(shape)]

        inputs = [sums.cotangent]
        (cotangent,) = self._pieces.add("cotangent", in_rows, inputs)
        return sums._replace(cotangent=cotangent)

    def _start(self) -> tuple[LossSums, list[Placed]]:
        """Add sums of zero, and the dense weights of the heads that need one."""
        model = self._model
        heads = model.heads

        def start(*outside: mx.array) -> Outputs:
            model.put(model.outside, outside)
            weights = []
            self._dense_heads = []
            for head in heads:
                weight = head.dense_if_needed(self._dtype)
                if weight is not None:
                    self._dense_heads.append(head)
                    weights.append(weight)
            shape = (self._positions, self._width)
            cotangent = mx.zeros(shape, self._dtype)
            total = mx.zeros(())
            return [cotangent, total, *weights]

        outputs = self._pieces.add("dense", start, model.outside_arrays)
        cotangent, total, *weights = outputs
        grads = []
        for path in model.trained_outside:
            grads += self._zeros(path)
        return LossSums(total, cotangent, grads), weights

    def _zeros(self, path: str) -> list[Placed]:
        like = self._model.trained[path]

        def zeros() -> Outputs:
            return [mx.zeros_like(like)]

        key = ("zeros", path)
        return self._pieces.add(key, zeros, [])

    def _chunk(self, count: int, sums: LossSums, weights: list[Placed]) -> LossSums:
        """Add the loss of ``count`` positions and its gradients to the sums so far."""
        # which positions they are, the step picks on the host
        positions = mx.zeros(count, mx.int32)
        where = self._pieces.add_input(positions, "batch")
        key = ("gather", count)
        inputs = [self._hidden, self._tokens, where]
        rows = self._pieces.add(key, self._gather, inputs)

        key = ("chunk", count)
        inputs = [*rows, *weights, *self._model.outside_arrays]
        outputs = self._pieces.add_compiled(key, self._slope, inputs)
        loss, slope, *grads = outputs

        key = ("add", count)
        inputs = [loss, slope, sums.total, sums.cotangent, where, *sums.grads, *grads]
        total, cotangent, *grads = self._pieces.add(key, _add, inputs)
        return LossSums(total, cotangent, grads)

    def _gather(self, hidden: mx.array, tokens: mx.array, where: mx.array) -> Outputs:
        """Rows, targets and weights of some positions.

        Shapes: ``(1, n, width)``, ``(1, n)`` and ``(1, n)``.
        """
        targets = tokens[:, 1:]
        counted = targets.astype(mx.float32).reshape(-1)
        flat_hidden = hidden.reshape(-1, self._width)
        flat_targets = targets.reshape(-1)
        return [
            flat_hidden[where][None],
            flat_targets[where][None],
            counted[where][None],
        ]

    def _slope(
        self, rows: mx.array, targets: mx.array, share: mx.array, *arrays: mx.array
    ) -> Outputs:
        """Loss of a chunk, its gradient by the rows, and those by what is trained outside.

        Args:
            rows: ``(1, n, width)``.
            targets: ``(1, n)`` integers.
            share: ``(1, n)``, weight of each position in the sum.
            arrays: dense weights of heads, then all arrays outside the blocks.
        """
        model = self._model
        count = len(self._dense_heads)
        weights = arrays[:count]
        others = arrays[count:]
        outside = dict(zip(model.outside, others, strict=True))

        def logits(rows: mx.array, *trained: mx.array) -> mx.array:
            changed = dict(zip(model.trained_outside, trained, strict=True))
            arrays = outside | changed
            with ExitStack() as stack:
                model.put(arrays, list(arrays.values()))
                pairs = zip(self._dense_heads, weights, strict=True)
                for head, weight in pairs:
                    dense = head.using_dense(weight)
                    stack.enter_context(dense)
                return model.stack.after(rows)

        def outputs(rows: mx.array, *trained: mx.array) -> Outputs:
            return [logits(rows, *trained)]

        trained = [outside[path] for path in model.trained_outside]
        primals = [rows, *trained]
        values = logits(*primals)
        loss, slope = nats_and_slope(values, targets, share)
        _, grads = mx.vjp(outputs, primals, [slope])
        return [loss, *grads]


def _add(
    loss: mx.array,
    slope: mx.array,
    total: mx.array,
    cotangent: mx.array,
    where: mx.array,
    *grads: mx.array,
) -> Outputs:
    """Add a chunk to the sums; the first half of ``grads`` are the sums, the second the chunk's."""
    half = len(grads) // 2
    pairs = zip(grads[:half], grads[half:], strict=True)
    summed = [old + new for old, new in pairs]
    total = total + loss
    cotangent = cotangent.at[where].add(slope[0])
    return [total, cotangent, *summed]
