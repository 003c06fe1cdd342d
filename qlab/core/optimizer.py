"""What an optimizer must declare and do. The optimizers themselves are files in ``optimizers/``. Knows no model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any


class OptimizerKind(ABC):
    """How parameters are changed by gradients. One instance per kind stands on the shelf.

    Attributes:
        name: the ``optimizer`` that a user types.
        title: one line that says what it is.
        elementwise: whether each number is updated by itself, with state of the parameter's own shape. Then all parameters
            are updated as one vector, to the same bits; False is always right.
    """

    name: str
    title: str
    elementwise: bool = False

    @abstractmethod
    def state_nbytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        """Bytes kept from step to step for one parameter.

        Args:
            shape: of the parameter.
            itemsize: bytes of one of its numbers.
        """

    @abstractmethod
    def make(self, learning_rate: float, weight_decay: float = 0.0) -> Any:
        """Return an ``mlx.optimizers.Optimizer``; decay is decoupled from the gradient."""
