"""Muon: one momentum, made orthogonal. Source: Jordan et al. 2024, and Moonlight (arXiv:2502.16982)."""

from __future__ import annotations

from math import prod
from typing import Any

import mlx.optimizers as optim

from qlab.core.optimizer import OptimizerKind


class Muon(OptimizerKind):
    """Muon, on matrices; vectors get plain momentum."""

    name = "muon"
    title = "Muon: one momentum a parameter, made orthogonal"

    def state_nbytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        return itemsize * prod(shape)

    def make(self, learning_rate: float, weight_decay: float = 0.0) -> Any:
        return optim.Muon(learning_rate, weight_decay=weight_decay)


SHELF = (Muon(),)
