"""What a solver must declare and do. The solvers themselves are files in ``solvers/``.

A scheme says how codes are stored; a solver chooses the codes. The engine asks one for every layer
that it quantizes. Knows no model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from qlab.core.config.quant import PackedArrays, QuantConfig


class Solver(ABC):
    """How the codes of a quantized weight are chosen. One instance per solver is on the shelf.

    Example:
        Clipping before rounding, in a notebook cell::

            import mlx.core as mx
            import qlab
            from qlab.core.config.solver import Solver

            class Clipped(Solver):
                name = "clipped"
                title = "clipped at three standard deviations"
                needs_inputs = False
                modes = None  # fills every scheme

                def solve(self, weight, config, input_power=None):
                    limit = 3 * weight.astype(mx.float32).std()
                    clipped = mx.clip(weight, -limit, limit).astype(weight.dtype)
                    return config.scheme.quantize(clipped, config)

            qlab.register("solvers", Clipped())
            q.quantize(solver="clipped")  # q = qlab.Quantizer(model, …)

    Attributes:
        name: the ``solver`` that a user types.
        title: one line that says what it does, shown beside the menu.
        needs_inputs: whether it needs the second moments of the layer's inputs (a calibration
            text).
        modes: names of the schemes that it can fill, or None for all.
    """

    name: str
    title: str
    needs_inputs: bool
    modes: tuple[str, ...] | None

    @abstractmethod
    def solve(self, weight: Any, config: QuantConfig, input_power: Any = None) -> PackedArrays:
        """Return packed arrays for a weight, as the scheme's ``quantize`` would.

        Args:
            weight: ``(…, out, in)``.
            config: scheme, bits and group size.
            input_power: float32 ``(in,)``, mean square of each input feature, if ``needs_inputs``.
        """
