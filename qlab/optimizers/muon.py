"""Muon: one momentum, made orthogonal.

Sources: Jordan et al. 2024 (kellerjordan.github.io/posts/muon), and Moonlight (arXiv:2502.16982).
"""

from __future__ import annotations

from math import prod
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from qlab.core.config.train import MlxLmOptimizer, OptimizerKind


class _EachMatrix(optim.Muon):
    """MLX's Muon, but each matrix of a stack is made orthogonal by itself.

    The factors of a mixture's experts are such stacks, ``(experts, rows, columns)``.
    """

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]
    ) -> mx.array:
        if gradient.ndim < 3:
            return super().apply_single(gradient, parameter, state)

        def one_matrix(
            gradient: mx.array, parameter: mx.array, moment: mx.array
        ) -> tuple[mx.array, mx.array]:
            matrix_state = {"v": moment}
            updated = self.apply_single(gradient, parameter, matrix_state)
            return updated, matrix_state["v"]

        updated, moments = mx.vmap(one_matrix)(gradient, parameter, state["v"])
        state["v"] = moments
        return updated


class Muon(OptimizerKind):
    """Muon, on matrices; vectors get plain momentum."""

    name = "muon"
    title = "Muon: one momentum a parameter, made orthogonal"
    mlx_lm = MlxLmOptimizer("muon")

    def state_nbytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        return itemsize * prod(shape)

    def make(self, learning_rate: float, weight_decay: float = 0.0) -> Any:
        return _EachMatrix(learning_rate, weight_decay=weight_decay)


SHELF = (Muon(),)
