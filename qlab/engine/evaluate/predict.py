"""What a model predicts at chosen positions, a chunk of logits at a time, and its most likely
answer to a prompt.

Knows neither what is right nor any other model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import mlx.core as mx
import mlx.nn as nn

from qlab.engine.models.blocks import BlockStack
from qlab.engine.models.surgery import twin
from qlab.errors import UnsupportedError

CHUNK_NBYTES = 64e6  # of float32 logits that exist at once, for each model


class Predictor:
    """A model, dropout off.

    Args:
        module: an mlx-lm model; it is not changed.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = twin(module)
        self._module.eval()
        try:
            self._stack: BlockStack | None = BlockStack(self._module)
        except UnsupportedError:
            self._stack = None

    @cached_property
    def vocabulary(self) -> int:
        """Outcomes of a prediction."""
        return self.logits(self._rows(mx.zeros((1, 1), mx.int32), lambda x: None)).shape[
            -1
        ]  # never computed

    def hidden(self, tokens: mx.array, where: mx.array) -> mx.array:
        """Return what ``logits`` takes for chosen positions, evaluated, ``(n, …)``.

        A block at a time where that can be.

        Args:
            tokens: ``(B, T)``.
            where: positions among all, row after row, integers ``(n,)``.
        """
        rows = self._rows(tokens, mx.eval)[
            where
        ]  # else the weights of many blocks would be dequantized at once
        mx.eval(rows)
        return rows

    def logits(self, hidden: mx.array) -> mx.array:
        """Return logits of the next token, float32 ``(n, vocabulary)``, lazily."""
        return (self._stack.after(hidden[None])[0] if self._stack is not None else hidden).astype(
            mx.float32
        )

    def log_probs(self, hidden: mx.array) -> mx.array:
        """Return log-probabilities of the next token, float32 ``(n, vocabulary)``, lazily."""
        logits = self.logits(hidden)
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)

    def _rows(self, tokens: mx.array, between: Callable[[mx.array], None]) -> mx.array:
        if self._stack is not None:
            try:
                x, calls = self._stack.before(tokens)
            except UnsupportedError:
                self._stack = None
        if self._stack is None:  # then all logits exist at once
            return self._module(tokens).reshape(tokens.size, -1)
        for block, (args, kwargs) in zip(self._stack.blocks, calls, strict=True):
            x = block(x, *args, **kwargs)
            between(x)
        return x.reshape(tokens.size, -1)


def chunk_length(vocabulary: int) -> int:
    """Positions whose logits may exist at once."""
    return max(1, int(CHUNK_NBYTES / (4 * vocabulary)))
