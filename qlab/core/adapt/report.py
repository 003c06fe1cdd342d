"""``AdapterReport``: an adapter layer by layer, with what its rank recovers.

``Adapter.report`` returns it; ``qlab.views.adapter.report`` draws it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from qlab.core.adapt.recovery import Recovery
from qlab.core.config.lora import LoRAConfig
from qlab.core.config.spec import LayerSpec, ModelSpec
from qlab.core.display import Displayed

NAN = float("nan")


@dataclass(frozen=True, kw_only=True)
class LayerAdapter:
    """The adapter of one layer.

    Attributes:
        path: the layer.
        rank: of the two factors.
        size: trainable parameters.
        nbytes: bytes of these parameters.
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
class AdapterReport(Displayed):
    """An adapter, layer by layer.

    Attributes:
        config: the adapter's settings.
        layers: the adapted layers, in model order.
        model_size: parameters of the model.
    """

    config: LoRAConfig
    layers: tuple[LayerAdapter, ...]
    model_size: int

    @property
    def size(self) -> int:
        """Number of trainable parameters."""
        return sum(layer.size for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of the adapter."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def share(self) -> float:
        """Trainable parameters as a share of the model's parameters."""
        return self.size / self.model_size

    def to_pandas(self) -> Any:
        """Return a data frame, a row per layer."""
        import pandas as pd

        return pd.DataFrame(
            [{f.name: getattr(layer, f.name) for f in fields(layer)} for layer in self.layers]
        )

    def __repr__(self) -> str:
        figures = [
            self.config.kind,
            f"rank {self.config.rank}",
            f"{len(self.layers)} layers",
            f"{self.size:,} trainable parameters",
            f"{100 * self.share:.2f} % of the model",
            f"{self.nbytes / 1e6:.2f} MB",
        ]
        return f"AdapterReport({', '.join(figures)})"


def report_of(
    spec: ModelSpec, config: LoRAConfig, recoveries: Mapping[str, Recovery | None]
) -> AdapterReport:
    """Return the table of an adapter's layers with what is known of them."""
    rows = tuple(
        _layer(layer, config, recoveries.get(layer.path)) for layer in config.targets(spec)
    )
    return AdapterReport(config, rows, spec.size)


def _layer(layer: LayerSpec, config: LoRAConfig, recovery: Recovery | None) -> LayerAdapter:
    rank = config.rank
    size = config.adapter_kind.size(layer.shape, rank)
    row = LayerAdapter(path=layer.path, rank=rank, size=size, nbytes=size * config.itemsize)
    if recovery is None:
        return row
    white_noise = replace(recovery, weight=recovery.noise_weight)
    return replace(
        row,
        relative_error=recovery.relative_error,
        recovered=recovery.share(rank),
        recovered_noise=white_noise.share(rank),
        recovered_output=recovery.share(rank, "qera"),
    )
