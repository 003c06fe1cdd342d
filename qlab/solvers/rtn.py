"""Round to nearest: what every format does by default. Knows no model."""

from __future__ import annotations

from typing import Any

from qlab.core.config.quant import PackedArrays, QuantConfig
from qlab.core.config.solver import Solver


class Rtn(Solver):
    """The scheme's own rounding."""

    name = "rtn"
    title = "round to nearest"
    needs_inputs = False
    modes = None

    def solve(self, weight: Any, config: QuantConfig, input_power: Any = None) -> PackedArrays:
        return config.scheme.quantize(weight, config)


SHELF = (Rtn(),)
