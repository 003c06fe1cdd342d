"""What comes after the blocks in a blockwise step: the loss of some positions, compiled."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from qlab.engine.models.blocks import BlockStack
from qlab.engine.models.functional import ArrayValues, Functional
from qlab.engine.models.surgery import module_at
from qlab.engine.step.loss import nats_and_slope
from qlab.nn.frozen import Frozen


class Chunk(NamedTuple):
    """Some positions of a batch, flattened.

    Attributes:
        rows: last hidden state, ``(1, positions, hidden)``.
        labels: the tokens to be predicted, ``(1, positions)``.
        weights: ``(1, positions)`` float32; 0 for padding.
    """

    rows: mx.array
    labels: mx.array
    weights: mx.array


class Head:
    """The norm and output head of a model, and the loss of what they give.

    Args:
        stack: the model.
        trained: paths of the trained arrays outside the blocks.
        on_trace: called whenever a function is compiled.

    Attributes:
        embeds: whether a trained array is needed before the blocks, too.
    """

    def __init__(self, stack: BlockStack, trained: list[str], on_trace: Callable[[], None]) -> None:
        self._stack = stack
        self._on_trace = on_trace
        self._functional = Functional(stack.module, without=stack.block_list)
        paths = [place.path for place in self._functional.places]
        self._trained_numbers = [paths.index(path) for path in trained]
        self._dropout_numbers = [n for n, p in enumerate(paths) if p.endswith("dropout_key")]
        self._heads = _output_heads(stack)
        self._dense_heads: list[Frozen] = []  # those that ``weights`` has dequantized
        self.embeds = any(_embeds(stack.module, path) for path in trained)
        self._compiled = mx.compile(self._loss)

    def weights(self, dtype: mx.Dtype) -> list[mx.array]:
        """Return the dequantized weights ``(out, in)`` of heads that need one; they serve a batch.

        Args:
            dtype: of the hidden state.
        """
        self._dense_heads = []
        weights = []
        for head in self._heads:
            weight = head.dense_if_needed(dtype)
            if weight is not None:
                self._dense_heads.append(head)
                weights.append(weight)
        return weights

    def dropout_keys(self, chunks: int) -> list[list[mx.array]]:
        """Return the dropout keys of every chunk: each drops inputs of its own."""
        arrays = self._functional.arrays
        if chunks <= 1:
            return [[arrays[n] for n in self._dropout_numbers]]
        split = [mx.random.split(arrays[n], chunks) for n in self._dropout_numbers]
        return [[keys[i] for keys in split] for i in range(chunks)]

    def loss_and_gradients(
        self, chunk: Chunk, weights: list[mx.array], dropout_keys: list[mx.array]
    ) -> list[mx.array]:
        """Return the loss of a chunk, and its gradients by its rows and by the trained arrays.

        Args:
            chunk: positions.
            weights: what ``weights`` returned.
            dropout_keys: those of this chunk.

        Returns:
            Loss ``()``, gradient by the rows ``(1, positions, hidden)``, gradients by the trained
            arrays.
        """
        arrays = self._functional.arrays
        for n, key in zip(self._dropout_numbers, dropout_keys, strict=True):
            arrays[n] = key
        return self._compiled(chunk.rows, chunk.labels, chunk.weights, arrays, weights)

    def _loss(
        self,
        rows: mx.array,
        labels: mx.array,
        weights: mx.array,
        arrays: ArrayValues,
        dense_weights: list[mx.array],
    ) -> list[mx.array]:
        """What ``loss_and_gradients`` compiles: all arrays are arguments."""
        self._on_trace()

        def logits(h: mx.array, *trained: mx.array) -> mx.array:
            every = list(arrays)
            for n, array in zip(self._trained_numbers, trained, strict=True):
                every[n] = array
            with ExitStack() as contexts:
                contexts.enter_context(self._functional.using(every))
                for head, weight in zip(self._dense_heads, dense_weights, strict=True):
                    contexts.enter_context(head.using_dense(weight))
                return self._stack.after(h)

        primals = [rows, *(arrays[n] for n in self._trained_numbers)]
        loss, slope = nats_and_slope(logits(*primals), labels, weights)
        # products are linear, so the logits of this second pass are never computed
        _, gradients = mx.vjp(lambda *a: [logits(*a)], primals, [slope])
        return [loss, *gradients]


def _output_heads(stack: BlockStack) -> list[Frozen]:
    """Return the frozen layers that make logits: an untied head, else the embedding."""
    outside = [
        layer
        for path, layer in stack.module.named_modules()
        if isinstance(layer, Frozen) and not path.startswith(stack.path)
    ]
    return [layer for layer in outside if not layer.embeds] or outside


def _embeds(module: nn.Module, path: str) -> bool:
    """Whether a trained array belongs to an embedding."""
    owner = module_at(module, path.rpartition(".")[0])
    return owner.base.embeds
