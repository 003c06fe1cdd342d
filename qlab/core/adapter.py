"""What a kind of adapter must declare and do. The kinds themselves are files in ``adapters/``. Knows no model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from qlab.errors import ConfigError

if TYPE_CHECKING:
    from qlab.core.training import LoRAConfig


class AdapterKind(ABC):
    """A small trainable change of a frozen layer. One instance per kind stands on the shelf.

    Attributes:
        name: the ``kind`` that a user types.
        title: one line that says what it is.
        adapts: kinds of layers that it can change: ``linear``, ``embedding``, ``switch``.
    """

    name: str
    title: str
    adapts: tuple[str, ...] = ("linear",)

    @abstractmethod
    def shapes(self, shape: tuple[int, ...], rank: int, kind: str = "linear") -> dict[str, tuple[int, ...]]:
        """Shapes of the trainable arrays, by parameter name.

        Args:
            shape: ``(out, in)`` of the weight; of an embedding ``(tokens, width)``, of experts ``(experts, out, in)``.
            rank: inner width.
            kind: of the layer. The number of trainable numbers does not depend on it.
        """

    def size(self, shape: tuple[int, ...], rank: int) -> int:
        """Number of trainable numbers on a weight of shape ``(…, out, in)``."""
        from math import prod

        return sum(prod(s) for s in self.shapes(shape, rank).values())

    @abstractmethod
    def make(self, base: Any, shape: tuple[int, ...], config: LoRAConfig) -> Any:
        """Return a module that runs the frozen ``base`` and adds the change, at first without effect.

        Args:
            base: a frozen layer: callable, ``dense(dtype)`` returns its weight ``(…, out, in)``, and ``layer`` is what it
                wraps; that of an embedding has ``as_linear``, and so must the module then. Experts are called with
                ``(x, indices, sorted_indices=False)``, as mlx-lm's ``SwitchLinear``.
            shape: ``(…, out, in)`` of its weight.
            config: rank, scale, dropout, dtype.
        """

    def compensated(self, outer: Any, inner: Any, norms: Any) -> dict[str, Any]:
        """Return trainable arrays by name that add ``scale`` times the product of two factors.

        Args:
            outer: ``(in, rank)``; of an embedding ``(tokens, rank)``, of experts ``(experts, rank, in)``.
            inner: ``(rank, out)``; of an embedding ``(rank, width)``, of experts ``(experts, out, rank)``.
            norms: ``(…, out)``, lengths of the rows of the weight before it was quantized.

        Raises:
            ConfigError: the kind cannot start so.
        """
        raise ConfigError(f"kind={self.name!r} cannot make up for the quantization error; use init='default'.")
