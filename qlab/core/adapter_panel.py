"""What an adapter panel shows at one moment, as a value, and the table of an adapter's layers.

Knows neither how it was measured nor how it is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from qlab import registry
from qlab.core.panel import Progress
from qlab.core.recovery import Recovery
from qlab.core.spec import ModelSpec
from qlab.core.training import LoRAConfig

NAN = float("nan")
NO_ORIGINAL = "The model came quantized and its original weights are not known; give Adapter the Quantizer."
NOT_QUANTIZED = "The model is not quantized, so there is no error to make up for; give Adapter a Quantizer."


@dataclass(frozen=True)
class LayerAdapter:
    """The adapter of one layer.

    Attributes:
        path: of the layer.
        rank: of the two factors.
        size: trainable numbers.
        nbytes: of them.
        relative_error: ‖W−Ŵ‖/‖W‖ of the layer; NaN if not measured, or if no original is known.
        recovered: share of the squared weight error that the data-free start of this rank takes away; NaN if not measured.
        recovered_noise: the same if the error were white noise (Marchenko–Pastur): only what is above it is structure.
        recovered_output: share of the squared error of the layer's output on held-out text that the best start of this rank
            takes away, whatever ``init`` is now; NaN if not measured.
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

        return pd.DataFrame([{f.name: getattr(layer, f.name) for f in fields(layer)} for layer in self.layers])

    def __repr__(self) -> str:
        return (
            f"AdapterReport({self.config.kind}, rank {self.config.rank}, {len(self.layers)} layers, {self.size:,} trainable "
            f"numbers, {100 * self.share:.2f} % of the model, {self.nbytes / 1e6:.2f} MB)"
        )


@dataclass(frozen=True, eq=False)
class AdapterState:
    """One moment of an adapter panel.

    Attributes:
        spec: the model.
        config: the adapter.
        storage: how the model's weights are stored, in words.
        recoveries: by path, what was measured of a layer; None where it has no error.
        stale: whether that belongs to a storage chosen earlier.
        obstacle: why no start can make up for the quantization error, or an empty string.
        origin: what the present parameters come from, or an empty string as long as they are not trained.
        progress: the running job, or None.
        error: the last error in words, or an empty string.
        source: the word for the source in the code.
        kinds: ``(name, title, what it adapts)`` of every kind on the shelf.
    """

    spec: ModelSpec
    config: LoRAConfig
    storage: str
    recoveries: Mapping[str, Recovery | None] = field(default_factory=dict)
    stale: bool = False
    obstacle: str = ""
    origin: str = ""
    progress: Progress | None = None
    error: str = ""
    source: str = "model"
    kinds: tuple[tuple[str, str, tuple[str, ...]], ...] = field(
        default_factory=lambda: tuple((kind.name, kind.title, kind.adapts) for kind in registry.shelf("adapters").values())
    )

    @property
    def optimizer(self) -> tuple[str, float]:
        """Name of the optimizer whose bytes are counted, and its bytes for one trainable number."""
        return "AdamW", registry.get("optimizers", "adamw").state_nbytes((1000,), self.config.itemsize) / 1000

    @property
    def code(self) -> str:
        """The Python that rebuilds this adapter."""
        return adapter_code(self.config, self.source)

    @property
    def report(self) -> AdapterReport:
        """The adapter, layer by layer."""
        return report_of(self.spec, self.config, self.recoveries)


def report_of(spec: ModelSpec, config: LoRAConfig, recoveries: Mapping[str, Recovery | None]) -> AdapterReport:
    """Return the table of an adapter's layers with what is known of them."""
    rows = []
    for layer in config.targets(spec):
        size, rank = config.adapter.size(layer.shape, config.rank), config.rank
        row = LayerAdapter(layer.path, rank, size, size * config.itemsize)
        if (found := recoveries.get(layer.path)) is not None:
            noise = replace(found, weight=found.noise_weight).share(rank)
            row = replace(
                row, relative_error=found.relative_error, recovered=found.share(rank), recovered_noise=noise,
                recovered_output=found.share(rank, "qera"),
            )  # fmt: skip
        rows.append(row)
    return AdapterReport(config, tuple(rows), spec.size)


def adapter_code(config: LoRAConfig, source: str) -> str:
    """Return the line that rebuilds an adapter, with only what differs from the defaults."""
    default, shown = LoRAConfig(), [f"rank={config.rank}"]
    for name in ("kind", "scale", "dropout", "keys", "num_layers", "init", "rslora", "dtype"):
        value = getattr(config, name)
        if value != getattr(default, name):
            text = f'"{value}"' if isinstance(value, str) else repr(list(value)) if isinstance(value, tuple) else f"{value:g}"
            shown.append(f"{name}={value if isinstance(value, bool) else text}".replace("'", '"'))
    return f"a = qlab.Adapter({source}, {', '.join(shown)})"
