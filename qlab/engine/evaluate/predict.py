"""``Predictor``: a model's predictions at chosen positions, a chunk of logits at a time.

The evaluation of models side by side, the teacher's stored predictions and the validation of a run
use it. It knows neither what is right nor any other model.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qlab.engine.models.blocks import BlockStack
from qlab.engine.models.surgery import twin
from qlab.errors import UnsupportedError
from qlab.ops.sums import logsumexp

CHUNK_NBYTES = 64e6  # of float32 logits that exist at once, for each model
_LOGIT_NBYTES = 4


class Predictor:
    """A model, dropout off.

    It runs a block at a time where its architecture is known, so that the dequantized weights of
    one block exist at once; elsewhere as a whole, and then all logits exist at once.

    Args:
        module: an mlx-lm model; it is not changed.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module: Any = twin(module)
        self._module.eval()
        self._stack: BlockStack | None = None
        with suppress(UnsupportedError):
            self._stack = BlockStack(self._module)

    @cached_property
    def vocabulary(self) -> int:
        """Outcomes of a prediction."""
        rows = self._rows(mx.zeros((1, 1), mx.int32), after_block=lambda x: None)
        return self.logits(rows).shape[-1]  # lazy: never computed

    def hidden(self, tokens: mx.array, where: mx.array) -> mx.array:
        """Return what ``logits`` takes for chosen positions, evaluated, ``(n, …)``.

        Args:
            tokens: ``(batch, length)``.
            where: positions among all, row after row, integers ``(n,)``.
        """
        # evaluated after each block, else the weights of many would be dequantized at once
        rows = self._rows(tokens, after_block=mx.eval)[where]
        mx.eval(rows)
        return rows

    def logits(self, hidden: mx.array) -> mx.array:
        """Return logits of the next token, float32 ``(n, vocabulary)``, lazily."""
        if self._stack is not None:
            hidden = self._stack.after(hidden[None])[0]
        return hidden.astype(mx.float32)

    def log_probs(self, hidden: mx.array) -> mx.array:
        """Return log-probabilities of the next token, float32 ``(n, vocabulary)``, lazily."""
        logits = self.logits(hidden)
        return logits - logsumexp(logits, keepdims=True)

    def _rows(self, tokens: mx.array, after_block: Callable[[mx.array], None]) -> mx.array:
        """Return hidden states ``(batch · length, …)``, or logits where blocks are unknown."""
        blockwise = self._before_blocks(tokens)
        if blockwise is None:
            return self._module(tokens).reshape(tokens.size, -1)
        stack, x, calls = blockwise
        for block, (args, kwargs) in zip(stack.blocks, calls, strict=True):
            x = block(x, *args, **kwargs)
            after_block(x)
        return x.reshape(tokens.size, -1)

    def _before_blocks(self, tokens: mx.array) -> tuple[BlockStack, mx.array, Any] | None:
        """Return the blocks, their first input, and each one's other arguments."""
        if self._stack is None:
            return None
        try:
            x, calls = self._stack.before(tokens)
        except UnsupportedError:
            self._stack = None
            return None
        return self._stack, x, calls


def chunk_length(vocabulary: int) -> int:
    """Return how many positions' logits may exist at once."""
    return max(1, int(CHUNK_NBYTES / (_LOGIT_NBYTES * vocabulary)))
