"""AdamW: two moments a parameter. Source: Loshchilov & Hutter 2019 (arXiv:1711.05101), algorithm 2."""

from __future__ import annotations

from math import prod
from typing import Any

import mlx.optimizers as optim

from qlab.core.optimizer import OptimizerKind


class AdamW(OptimizerKind):
    """AdamW with bias correction, as the paper has it (MLX's own default leaves the correction out)."""

    name = "adamw"
    title = "AdamW: two moments a parameter"

    def state_nbytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        return 2 * itemsize * prod(shape)

    def make(self, learning_rate: float, weight_decay: float = 0.0) -> Any:
        return optim.AdamW(learning_rate, weight_decay=weight_decay, bias_correction=True)


SHELF = (AdamW(),)
