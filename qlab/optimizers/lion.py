"""Lion: the sign of one moment. Source: Chen et al. 2023 (arXiv:2302.06675), algorithm 2."""

from __future__ import annotations

from math import prod
from typing import Any

import mlx.optimizers as optim

from qlab.core.config.train import OptimizerKind


class Lion(OptimizerKind):
    """Lion. Wants a learning rate three to ten times below AdamW's."""

    name = "lion"
    title = "Lion: one moment a parameter"
    elementwise = True

    def state_nbytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        return itemsize * prod(shape)

    def make(self, learning_rate: float, weight_decay: float = 0.0) -> Any:
        return optim.Lion(learning_rate, weight_decay=weight_decay)


SHELF = (Lion(),)
