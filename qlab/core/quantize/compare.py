"""Every scheme against every other: bits per weight against error, and which are worth having.

``q.compare()`` returns the report, ``views.cards.compare`` draws it. Pure arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from qlab.core.config.quant import QuantConfig
from qlab.core.config.spec import ModelSpec
from qlab.core.display import Charted
from qlab.core.quantize.table import ErrorTable

BY_KL = "predicted ΔKL, nats/token"
BY_ERROR = "relative weight error"


@dataclass(frozen=True, kw_only=True)
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
class CompareReport(Charted):
    """All configs on the shelf for one model; as the last line of a cell, a chart and a table.

    Example::

        report = q.compare()
        [point.config.label for point in report.front]
        report.figure()                      # the chart alone, a plotly figure

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

        rows = [asdict(point) | {"config": point.config.label} for point in self.points]
        return pd.DataFrame(rows).set_index("config")

    def __repr__(self) -> str:
        counts = f"{len(self.points)} schemes, {len(self.front)} on the front"
        return f"CompareReport({self.model!r}, {counts}, {self.measure})"


class _Measured(NamedTuple):
    """Size and error of one config."""

    config: QuantConfig
    nbytes: int
    error: float
    skipped: int


def compare(spec: ModelSpec, table: ErrorTable) -> CompareReport:
    """Compare all measured configs of a table.

    The error of a config is the sum of predicted ΔKL over the layers that every such sum needs;
    before a calibration it is the root mean square of the relative errors, each layer counted by
    its weights. A skipped layer costs its present bytes and adds no error.

    Args:
        spec: the model.
        table: its errors.
    """
    is_predicted = bool(np.isfinite(table.measure("kl_nats")).any())
    measured: list[_Measured] = []
    for row, config in enumerate(table.configs):
        error = _model_error(spec, table, row, is_predicted)
        if error is not None:
            nbytes = int(table.nbytes[row].sum()) + spec.other_nbytes
            skipped = int((~table.legal[row]).sum())
            measured.append(_Measured(config, nbytes, error, skipped))
    measured.sort(key=lambda item: (item.nbytes, item.error))
    points = tuple(
        SchemePoint(
            config=item.config,
            bits_per_weight=8 * item.nbytes / spec.size,
            nbytes=item.nbytes,
            error=item.error,
            dominated_by=_dominator(measured, item),
            skipped_layers=item.skipped,
        )
        for item in measured
    )
    return CompareReport(spec.name, BY_KL if is_predicted else BY_ERROR, points)


def _model_error(spec: ModelSpec, table: ErrorTable, row: int, is_predicted: bool) -> float | None:
    """Error of a config over all layers that it can store; None if none of them is measured."""
    errors = table.measure("kl_nats" if is_predicted else "relative_error")[row]
    known = np.isfinite(errors) & table.legal[row]
    if not known.any():
        return None
    if is_predicted:
        return float(errors[known].sum())
    sizes = np.array([layer.size for layer in spec.layers], np.float64)
    squares = sizes * errors**2
    return float(np.sqrt(squares[known].sum() / sizes.sum()))


def _dominator(measured: Sequence[_Measured], item: _Measured) -> str:
    """Label of the first config that is no larger and no worse than an item, and better in one."""
    for other in measured:
        no_worse = other.nbytes <= item.nbytes and other.error <= item.error
        better = other.nbytes < item.nbytes or other.error < item.error
        if no_worse and better:
            return other.config.label
    return ""
