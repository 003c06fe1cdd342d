"""``QuantReport``: what a plan does to a model, layer by layer, read out of an error table.

``q.report`` and ``q.measure()`` return it, ``views.quantizer.report`` draws it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qlab.core.config.legal import check_whole
from qlab.core.config.quant import QuantConfig, QuantPlan
from qlab.core.config.spec import LayerSpec, ModelSpec
from qlab.core.display import Displayed
from qlab.core.quantize.sampling import sqnr_db
from qlab.core.quantize.table import MEASURES, ErrorTable


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """What a storage config does to one layer.

    Attributes:
        path: the layer.
        config: its storage, or None where it keeps its own precision.
        relative_error: ‖W−Ŵ‖/‖W‖; NaN if not measured.
        relative_error_se: standard error of that; 0 where ``depth`` is exact.
        depth: ``exact`` (all weights), ``sampled`` (a random sample), ``kept`` (not quantized) or
            ``unknown``.
        max_abs_error: largest |W−Ŵ| that was seen.
        kl_nats: predicted ΔKL of the output in nats per token; NaN before a calibration.
        kurtosis: fourth standardized moment of the weights (3 for a Gaussian).
        nbytes: bytes of the weight under the config.
        note: why the config could not be applied, or an empty string.
    """

    path: str
    config: QuantConfig | None
    relative_error: float
    relative_error_se: float
    depth: str
    max_abs_error: float
    kl_nats: float
    kurtosis: float
    nbytes: int
    note: str = ""

    @property
    def sqnr_db(self) -> float:
        """Signal-to-quantization-noise ratio in dB."""
        return float(sqnr_db(self.relative_error))


@dataclass(frozen=True, kw_only=True)
class QuantReport(Displayed):
    """What a plan does to a model, layer by layer.

    Example::

        report = q.report
        report.bits_per_weight, report.kl_nats
        [layer.path for layer in report.worst(3)]
        report.to_pandas()

    Attributes:
        plan: the storage of every layer.
        layers: errors in model order.
        nbytes: bytes of all parameters under the plan.
        nbytes_before: bytes of all parameters as they are.
        size: number of all parameters.
        calibration: what text the predicted ΔKL comes from; empty if none.
    """

    plan: QuantPlan
    layers: tuple[LayerError, ...]
    nbytes: int
    nbytes_before: int
    size: int
    calibration: str = ""

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per parameter, over all parameters of the model."""
        return 8 * self.nbytes / self.size

    @property
    def kl_nats(self) -> float:
        """Predicted ΔKL of the whole plan: the sum over layers; NaN before a calibration."""
        return math.fsum(layer.kl_nats for layer in self._quantized)

    @property
    def skipped(self) -> tuple[LayerError, ...]:
        """Layers that the plan would quantize but cannot, with the reason in ``note``."""
        return tuple(layer for layer in self.layers if layer.note)

    @property
    def _quantized(self) -> list[LayerError]:
        return [layer for layer in self.layers if layer.depth != "kept"]

    def worst(self, count: int = 5) -> tuple[LayerError, ...]:
        """Return the layers that cost most, the worst first.

        By predicted ΔKL once it is known, by relative error until then.

        Args:
            count: layers at most.

        Raises:
            ConfigError: ``count`` is no whole number.
        """
        check_whole("count", count, 0)
        layers = self._quantized
        by_kl = any(not math.isnan(layer.kl_nats) for layer in layers)
        costs = [layer.kl_nats if by_kl else layer.relative_error for layer in layers]
        order = np.argsort([-math.inf if math.isnan(cost) else cost for cost in costs])
        return tuple(layers[i] for i in order[::-1][:count])

    def to_pandas(self) -> Any:
        """Return a data frame, a row a layer; sizes in bytes, ΔKL in nats per token, SQNR in dB."""
        import pandas as pd

        rows = []
        for layer in self.layers:
            label = layer.config.label if layer.config else "kept"
            rows.append(asdict(layer) | {"config": label, "sqnr_db": layer.sqnr_db})
        return pd.DataFrame(rows).set_index("path")

    def __repr__(self) -> str:
        facts = [
            self.plan.default.label,
            f"{self.bits_per_weight:.2f} bits/weight",
            f"{self.nbytes / 1e9:.3f} GB",
            f"{len(self.layers)} layers",
            f"{len(self.skipped)} skipped",
        ]
        if not math.isnan(self.kl_nats):
            facts.insert(3, f"predicted ΔKL {self.kl_nats:.3g} nats/token")
        return f"QuantReport({', '.join(facts)})"


def report_of(
    spec: ModelSpec, table: ErrorTable, plan: QuantPlan, calibration: str = ""
) -> QuantReport:
    """Read a plan out of an error table.

    Args:
        spec: the model.
        table: its errors.
        plan: the storage.
        calibration: what text the predicted ΔKL comes from; empty if none.

    Raises:
        LayerNotFoundError: an override names no layer.
    """
    for path in plan.overrides:
        _ = spec[path]
    layers = tuple(
        _layer_error(table, column, layer, plan) for column, layer in enumerate(spec.layers)
    )
    return QuantReport(
        plan=plan,
        layers=layers,
        nbytes=sum(layer.nbytes for layer in layers) + spec.other_nbytes,
        nbytes_before=spec.nbytes,
        size=spec.size,
        calibration=calibration,
    )


def _layer_error(table: ErrorTable, column: int, layer: LayerSpec, plan: QuantPlan) -> LayerError:
    config = plan.config_for(layer.path)
    kurtosis = float(table.kurtosis[column])
    refusal = layer.refusal(config) if config else None
    if config is None or refusal:
        return LayerError(
            path=layer.path,
            config=None,
            relative_error=0.0,
            relative_error_se=0.0,
            depth="kept",
            max_abs_error=0.0,
            kl_nats=0.0,
            kurtosis=kurtosis,
            nbytes=layer.nbytes,
            note=refusal or "",
        )
    row = table.row(config)
    cell = {name: float(table.measure(name)[row, column]) for name in MEASURES}
    return LayerError(
        path=layer.path,
        config=config,
        relative_error=cell["relative_error"],
        relative_error_se=cell["relative_error_se"],
        depth=_depth(cell["relative_error"], bool(table.exact[row, column])),
        max_abs_error=cell["max_abs_error"],
        kl_nats=cell["kl_nats"],
        kurtosis=kurtosis,
        nbytes=int(table.nbytes[row, column]),
    )


def _depth(error: float, is_exact: bool) -> str:
    if is_exact:
        return "exact"
    return "unknown" if math.isnan(error) else "sampled"
