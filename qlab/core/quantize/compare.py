"""Every scheme against every other.

Bits per weight against error, and which of them are worth having. Pure arithmetic.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qlab.core.config.quant import QuantConfig
from qlab.core.config.spec import ModelSpec
from qlab.core.quantize.table import ErrorTable


@dataclass(frozen=True)
class SchemePoint:
    """One config used for the whole model.

    Attributes:
        config: the storage.
        bits_per_weight: over all parameters of the model, unquantized ones included.
        nbytes: of all parameters.
        error: in the report's measure.
        dominated_by: label of a config that is no larger and no worse, and better in one; empty on
            the Pareto front.
        skipped_layers: layers that the config cannot store; they stay as they are.
    """

    config: QuantConfig
    bits_per_weight: float
    nbytes: int
    error: float
    dominated_by: str
    skipped_layers: int


@dataclass(frozen=True)
class CompareReport:
    """All configs on the shelf for one model.

    Attributes:
        model: name of the model.
        measure: ``predicted ΔKL, nats/token`` or ``relative weight error``.
        points: smallest first.
    """

    model: str
    measure: str
    points: tuple[SchemePoint, ...]

    @property
    def front(self) -> tuple[SchemePoint, ...]:
        """The configs that no other dominates, smallest first."""
        return tuple(point for point in self.points if not point.dominated_by)

    def to_pandas(self) -> Any:
        """Return a data frame, a row a config."""
        import pandas as pd

        return pd.DataFrame(
            [{**asdict(p), "config": p.config.label} for p in self.points]
        ).set_index("config")

    def __repr__(self) -> str:
        return f"CompareReport({self.model!r}, {len(self.points)} schemes, {len(self.front)} on the front, {self.measure})"


def compare(spec: ModelSpec, table: ErrorTable) -> CompareReport:
    """Compare all measured configs of a table.

    The error of a config is the sum of predicted ΔKL over the layers that every such sum needs;
    before a calibration it is the root mean square of the relative errors, each layer counted by
    its weights. A skipped layer costs its present bytes and adds no error.

    Args:
        spec: the model.
        table: its errors.
    """
    kl = table.measure("kl_nats")
    relative = table.measure("relative_error")
    predicted = bool(np.isfinite(kl).any())
    sizes = np.array([layer.size for layer in spec.layers], np.float64)
    found = []
    for row, config in enumerate(table.configs):
        legal = table.legal[row]
        known = np.isfinite((kl if predicted else relative)[row]) & legal
        if not known.any():
            continue
        error = (
            kl[row, known].sum()
            if predicted
            else np.sqrt((sizes * relative[row] ** 2)[known].sum() / sizes.sum())
        )
        found.append(
            (
                config,
                int(table.nbytes[row].sum()) + spec.other_nbytes,
                float(error),
                int((~legal).sum()),
            )
        )
    found.sort(key=lambda item: (item[1], item[2]))
    points = tuple(
        SchemePoint(
            config, 8 * nbytes / spec.size, nbytes, error, _dominator(found, nbytes, error), skipped
        )
        for config, nbytes, error, skipped in found
    )
    return CompareReport(
        spec.name, "predicted ΔKL, nats/token" if predicted else "relative weight error", points
    )


def _dominator(found: list[tuple], nbytes: int, error: float) -> str:
    better = [c for c, n, e, _ in found if n <= nbytes and e <= error and (n < nbytes or e < error)]
    return better[0].label if better else ""
