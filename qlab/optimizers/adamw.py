"""AdamW: two moments a parameter.

Source: Loshchilov & Hutter 2019 (arXiv:1711.05101), algorithm 2.
"""

from __future__ import annotations

from math import prod
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from qlab.core.config.train import MlxLmOptimizer, OptimizerKind


class AdamW(OptimizerKind):
    """AdamW with bias correction, as in the paper (MLX's default leaves the correction out)."""

    name = "adamw"
    title = "AdamW: two moments a parameter"
    elementwise = True
    mlx_lm = MlxLmOptimizer("adamw", {"bias_correction": True})

    def state_nbytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        return 2 * itemsize * prod(shape)

    def make(self, learning_rate: float, weight_decay: float = 0.0) -> Any:
        return _Optimizer(learning_rate, weight_decay=weight_decay, bias_correction=True)


class _Optimizer(optim.AdamW):
    """MLX's AdamW, bit for bit, but the powers of the step are computed once.

    MLX would fuse them into the work that is done for every number.
    """

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]
    ) -> mx.array:
        dtype = gradient.dtype
        rate = self.learning_rate.astype(dtype)
        b1, b2 = self.betas
        of_first = rate / (1 - b1**self.step)
        of_second = mx.rsqrt(1 - b2**self.step)
        corrections = [of_first, of_second]
        first, second = mx.depends(corrections, [self.step])  # nothing is fused across this
        m = b1 * state["m"] + (1 - b1) * gradient
        v = b2 * state["v"] + (1 - b2) * mx.square(gradient)
        state["m"] = m
        state["v"] = v
        second = second.astype(dtype)
        size = mx.sqrt(v) * second + self.eps
        first = first.astype(dtype)
        move = first * m / size
        decay = 1 - rate * self.weight_decay
        return parameter * decay - move


SHELF = (AdamW(),)
