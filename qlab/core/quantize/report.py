"""What was measured, as frozen values that can be read, compared and turned into data frames.

Knows neither how it was measured nor how it is drawn.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qlab.core.config.quant import QuantConfig, QuantPlan
from qlab.core.config.spec import LayerSpec, ModelSpec
from qlab.core.display import Displayed
from qlab.core.quantize.sampling import sqnr_db
from qlab.core.quantize.table import ErrorTable


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class QuantReport(Displayed):
    """What a plan does to a model, layer by layer.

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
        known = [x.kl_nats for x in self.layers if x.depth != "kept"]
        return math.fsum(known) if known else 0.0

    @property
    def skipped(self) -> tuple[LayerError, ...]:
        """Layers that the plan would quantize but cannot, with the reason in ``note``."""
        return tuple(x for x in self.layers if x.note)

    def worst(self, count: int = 5) -> tuple[LayerError, ...]:
        """Return the layers that cost most.

        By predicted ΔKL once it is known, by relative error until then.
        """
        measured = [x for x in self.layers if x.depth != "kept"]
        by_kl = any(not math.isnan(x.kl_nats) for x in measured)
        cost = [(x.kl_nats if by_kl else x.relative_error) for x in measured]
        order = np.argsort([-math.inf if math.isnan(c) else c for c in cost])[::-1]
        return tuple(measured[i] for i in order[:count])

    def to_pandas(self) -> Any:
        """Return a data frame, a row a layer; sizes in bytes, ΔKL in nats per token, SQNR in dB."""
        import pandas as pd

        rows = [
            {
                **asdict(x),
                "config": x.config.label if x.config else "kept",
                "sqnr_db": x.sqnr_db,
            }
            for x in self.layers
        ]
        return pd.DataFrame(rows).set_index("path")

    def __repr__(self) -> str:
        text = f"QuantReport({self.plan.default.label}, {self.bits_per_weight:.2f} bits/weight, {self.nbytes / 1e9:.3f} GB"
        if not math.isnan(self.kl_nats):
            text += f", predicted ΔKL {self.kl_nats:.3g} nats/token"
        return text + f", {len(self.layers)} layers, {len(self.skipped)} skipped)"


def report_of(
    spec: ModelSpec, table: ErrorTable, plan: QuantPlan, calibration: str = ""
) -> QuantReport:
    """Read a plan out of an error table.

    Raises:
        LayerNotFoundError: an override names no layer.
    """
    for path in plan.overrides:
        _ = spec[path]
    layers = tuple(_layer_error(table, i, layer, plan) for i, layer in enumerate(spec.layers))
    nbytes = sum(x.nbytes for x in layers) + spec.other_nbytes
    return QuantReport(plan, layers, nbytes, spec.nbytes, spec.size, calibration)


def _layer_error(table: ErrorTable, column: int, layer: LayerSpec, plan: QuantPlan) -> LayerError:
    config = plan.config_for(layer.path)
    kurtosis = float(table.kurtosis[column])
    refusal = layer.refusal(config) if config else None
    if config is None or refusal:
        return LayerError(
            layer.path, None, 0.0, 0.0, "kept", 0.0, 0.0, kurtosis, layer.nbytes, refusal or ""
        )
    row = table.row(config)
    value, se, largest, kl, _ = (float(x) for x in table.values[:, row, column])
    depth = "exact" if table.exact[row, column] else "unknown" if math.isnan(value) else "sampled"
    return LayerError(
        layer.path, config, value, se, depth, largest, kl, kurtosis, int(table.nbytes[row, column])
    )
