"""The loss of rows held out: forward pass only, without dropout, a chunk of logits at a time.

The loop calls ``nats`` for every batch of a validation.
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
from qlab.ops.sums import cross_entropy

_CHUNK = 512  # positions whose logits exist at once


@dataclass(frozen=True)
class Nats:
    """Losses summed over targets.

    Attributes:
        total: sum of the losses, in nats.
        count: number of targets.
    """

    total: float = 0.0
    count: int = 0

    def __add__(self, other: Nats) -> Nats:
        total = self.total + other.total
        count = self.count + other.count
        return Nats(total, count)

    @property
    def mean(self) -> float:
        """Mean loss in nats/token over the targets; NaN without targets."""
        if not self.count:
            return float("nan")
        return self.total / self.count


def nats(module: nn.Module, parameters: Arrays, batch: Batch) -> Nats:
    """Return the loss of a batch.

    Args:
        module: what ``attach`` returned; it has these parameters afterwards.
        parameters: trainable arrays by path, evaluated.
        batch: padded rows ``(rows, length)``, not packed.
    """
    tree = tree_unflatten(list(parameters.items()))
    module.update(tree)
    tokens = mx.array(batch.tokens)
    mask = batch.mask[:, 1:]  # position i predicts token i + 1
    places = mask.reshape(-1).nonzero()[0]
    positions = mx.array(places.astype("int32"))  # (targets,)
    predicted = tokens[:, 1:].reshape(-1)
    targets = predicted[positions]
    predictor = Predictor(module)
    inputs = tokens[:, :-1]
    hidden = predictor.hidden(inputs, positions)  # (targets, hidden size)
    total = mx.array(0.0)
    for start in range(0, positions.size, _CHUNK):
        chunk = slice(start, start + _CHUNK)
        logits = predictor.logits(hidden[chunk])
        losses = cross_entropy(logits, targets[chunk])
        total = total + losses.sum()
        mx.eval(total)
    in_nats = cast(float, total.item())
    count = int(mask.sum())
    return Nats(in_nats, count)
