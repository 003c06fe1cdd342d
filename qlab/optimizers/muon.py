"""Muon: one momentum, made orthogonal. Source: Jordan et al.

2024, and Moonlight (arXiv:2502.16982).
"""

from __future__ import annotations

from math import prod
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from qlab.core.config.train import OptimizerKind


class _EachMatrix(optim.Muon):
    """MLX's own, but each matrix of a stack (the factors of a mixture's experts) is made orthogonal
    by itself.
    """

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]
    ) -> mx.array:
        if gradient.ndim < 3:
            return super().apply_single(gradient, parameter, state)

        def one(
            gradient: mx.array, parameter: mx.array, moment: mx.array
        ) -> tuple[mx.array, mx.array]:
            own = {"v": moment}
            return self.apply_single(gradient, parameter, own), own["v"]

        made, state["v"] = mx.vmap(one)(gradient, parameter, state["v"])
        return made


class Muon(OptimizerKind):
    """Muon, on matrices; vectors get plain momentum."""

    name = "muon"
    title = "Muon: one momentum a parameter, made orthogonal"

    def state_nbytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        return itemsize * prod(shape)

    def make(self, learning_rate: float, weight_decay: float = 0.0) -> Any:
        return _EachMatrix(learning_rate, weight_decay=weight_decay)


SHELF = (Muon(),)
