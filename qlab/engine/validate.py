"""The loss of rows held out: forward only, dropout off, a block and a chunk of logits at a time.

Knows no schedule.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from qlab.core.rows import Batch
from qlab.engine.stack import Stack
from qlab.engine.step import Arrays
from qlab.errors import UnsupportedError

_CHUNK = 512  # positions whose logits exist at once


@dataclass(frozen=True)
class Nats:
    """A sum of losses.

    Attributes:
        total: in nats.
        count: number of targets.
    """

    total: float = 0.0
    count: int = 0

    def __add__(self, other: Nats) -> Nats:
        return Nats(self.total + other.total, self.count + other.count)

    @property
    def mean(self) -> float:
        """Nats per target; NaN without targets."""
        return self.total / self.count if self.count else float("nan")


def nats(module: nn.Module, parameters: Arrays, batch: Batch) -> Nats:
    """Return the loss of a batch.

    Args:
        module: what ``attach`` returned; it has these parameters afterwards.
        parameters: trainable arrays by path, evaluated.
        batch: padded rows, not packed.
    """
    module.update(tree_unflatten(list(parameters.items())))
    module.eval()
    try:
        tokens, mask = mx.array(batch.tokens), batch.mask[:, 1:]
        where = mx.array(mask.reshape(-1).nonzero()[0].astype("int32"))
        targets = tokens[:, 1:].reshape(-1)[where]
        total = mx.array(0.0)
        for start, logits in _logits(module, tokens[:, :-1], where):
            label = targets[start : start + logits.shape[0]]
            total = total + nn.losses.cross_entropy(logits.astype(mx.float32), label).sum()
            mx.eval(total)
        return Nats(total.item(), int(mask.sum()))
    finally:
        module.train()


def _logits(module: nn.Module, inputs: mx.array, where: mx.array) -> Iterator[tuple[int, mx.array]]:
    """Yield the logits of chosen positions, ``(chunk, vocabulary)``, and how many came before."""
    try:
        stack = Stack(module)
        x, calls = stack.before(inputs)
    except UnsupportedError:  # then all logits exist at once
        yield 0, module(inputs).reshape(inputs.size, -1)[where]
        return
    for block, (args, kwargs) in zip(stack.blocks, calls, strict=True):
        x = block(x, *args, **kwargs)
        mx.eval(x)
    rows = x.reshape(-1, x.shape[-1])
    for start in range(0, where.size, _CHUNK):
        picked = rows[where[start : start + _CHUNK]]
        yield start, stack.after(picked[None])[0]
