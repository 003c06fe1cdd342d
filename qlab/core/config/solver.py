"""What a solver must declare and do. The solvers themselves are files in ``solvers/``.

A scheme says how codes are stored; a solver chooses the codes. Knows no model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from qlab.core.config.quant import QuantConfig


class Solver(ABC):
    """How codes are chosen for a scheme. One instance per solver stands on the shelf.

    Attributes:
        name: the ``solver`` that a user types.
        title: one line that says what it does.
        needs_inputs: whether it needs the second moments of the layer's inputs (a calibration
            text).
        modes: schemes that it can fill, or None for all.
    """

    name: str
    title: str
    needs_inputs: bool
    modes: tuple[str, ...] | None

    @abstractmethod
    def solve(self, weight: Any, config: QuantConfig, input_power: Any = None) -> dict[str, Any]:
        """Return packed arrays for a weight.

        Args:
            weight: ``(…, out, in)``.
            config: scheme, bits and group size.
            input_power: float32 ``(in,)``, mean square of each input feature, if ``needs_inputs``.
        """
