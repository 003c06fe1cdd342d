"""Adafactor: the second moment of a matrix as the product of a row and a column.

Source: Shazeer & Stern 2018 (arXiv:1804.04235), algorithm 4, with a learning rate from outside.
"""

from __future__ import annotations

from math import prod
from typing import Any

import mlx.optimizers as optim

from qlab.core.config.train import MlxLmOptimizer, OptimizerKind


class Adafactor(OptimizerKind):
    """Adafactor without momentum: nearly no state."""

    name = "adafactor"
    title = "Adafactor: nearly no state"
    mlx_lm = MlxLmOptimizer("adafactor", {"relative_step": False, "scale_parameter": False})

    def state_nbytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        if len(shape) < 2:
            return itemsize * prod(shape)
        rows = prod(shape[:-1])
        columns = prod(shape[:-2]) * shape[-1]
        return itemsize * (rows + columns)

    def make(self, learning_rate: float, weight_decay: float = 0.0) -> Any:
        return optim.Adafactor(
            learning_rate, weight_decay=weight_decay, relative_step=False, scale_parameter=False
        )


SHELF = (Adafactor(),)
