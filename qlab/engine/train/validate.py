"""The loss of rows held out: forward only, dropout off, a block and a chunk of logits at a time.

Knows no schedule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from qlab.core.train.rows import Batch
from qlab.engine.evaluate.predict import Predictor
from qlab.engine.step.protocol import Arrays

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
    tokens = mx.array(batch.tokens)
    mask = batch.mask[:, 1:]
    where = mx.array(mask.reshape(-1).nonzero()[0].astype("int32"))
    targets = tokens[:, 1:].reshape(-1)[where]
    predictor = Predictor(module)
    total = mx.array(0.0)
    rows = predictor.hidden(tokens[:, :-1], where)
    for start in range(0, where.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        total = total + nn.losses.cross_entropy(predictor.logits(rows[part]), targets[part]).sum()
        mx.eval(total)
    return Nats(cast(float, total.item()), int(mask.sum()))
