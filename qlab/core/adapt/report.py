"""What an adapter panel shows at one moment, as a value, and the table of an adapter's layers.

Knows neither how it was measured nor how it is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from qlab.core.adapt.recovery import Recovery
from qlab.core.config.lora import LoRAConfig
from qlab.core.config.spec import ModelSpec

NAN = float("nan")


@dataclass(frozen=True)
class LayerAdapter:
    """The adapter of one layer.

    Attributes:
        path: of the layer.
        rank: of the two factors.
        size: trainable numbers.
        nbytes: of them.
        relative_error: ‖W−Ŵ‖/‖W‖ of the layer; NaN if not measured, or if no original is known.
        recovered: share of the squared weight error that the data-free start of this rank takes
            away; NaN if not measured.
        recovered_noise: the same if the error were white noise (Marchenko–Pastur): only what is
            above it is structure.
        recovered_output: share of the squared error of the layer's output on held-out text that the
            best start of this rank takes away, whatever ``init`` is now; NaN if not measured.
    """

    path: str
    rank: int
    size: int
    nbytes: int
    relative_error: float = NAN
    recovered: float = NAN
    recovered_noise: float = NAN
    recovered_output: float = NAN


@dataclass(frozen=True)
class AdapterReport:
    """An adapter, layer by layer.

    Attributes:
        config: of the adapter.
        layers: that it adapts, in model order.
        model_size: parameters of the model.
    """

    config: LoRAConfig
    layers: tuple[LayerAdapter, ...]
    model_size: int

    @property
    def size(self) -> int:
        """Number of trainable numbers."""
        return sum(layer.size for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of the adapter."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def share(self) -> float:
        """Trainable numbers as a share of the model's parameters."""
        return self.size / self.model_size

    def to_pandas(self) -> Any:
        """Return a data frame, a row per layer."""
        import pandas as pd

        return pd.DataFrame(
            [{f.name: getattr(layer, f.name) for f in fields(layer)} for layer in self.layers]
        )

    def __repr__(self) -> str:
        return (
            f"AdapterReport({self.config.kind}, rank {self.config.rank}, {len(self.layers)} layers, {self.size:,} trainable "
            f"numbers, {100 * self.share:.2f} % of the model, {self.nbytes / 1e6:.2f} MB)"
        )


def report_of(
    spec: ModelSpec, config: LoRAConfig, recoveries: Mapping[str, Recovery | None]
) -> AdapterReport:
    """Return the table of an adapter's layers with what is known of them."""
    rows = []
    for layer in config.targets(spec):
        size = config.adapter.size(layer.shape, config.rank)
        rank = config.rank
        row = LayerAdapter(layer.path, rank, size, size * config.itemsize)
        if (found := recoveries.get(layer.path)) is not None:
            noise = replace(found, weight=found.noise_weight).share(rank)
            row = replace(
                row,
                relative_error=found.relative_error,
                recovered=found.share(rank),
                recovered_noise=noise,
                recovered_output=found.share(rank, "qera"),
            )
        rows.append(row)
    return AdapterReport(config, tuple(rows), spec.size)
