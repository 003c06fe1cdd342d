"""``AdapterState``: what the adapter panel shows, as a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qlab import registry
from qlab.core.adapt.recovery import Recovery
from qlab.core.adapt.report import AdapterReport, report_of
from qlab.core.config.code import adapter_code
from qlab.core.config.lora import LoRAConfig
from qlab.core.config.spec import ModelSpec
from qlab.core.progress import Progress

NO_ORIGINAL = (
    "The model came quantized and its original weights are not known; give Adapter the Quantizer."
)
NOT_QUANTIZED = (
    "The model is not quantized, so there is no error to make up for; give Adapter a Quantizer."
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
        origin: what the present parameters come from, or an empty string as long as they are not
            trained.
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
        default_factory=lambda: tuple(
            (kind.name, kind.title, kind.adapts) for kind in registry.shelf("adapters").values()
        )
    )

    @property
    def optimizer(self) -> tuple[str, float]:
        """Name of the optimizer whose bytes are counted, and its bytes for one trainable number."""
        return "AdamW", registry.get("optimizers", "adamw").state_nbytes(
            (1000,), self.config.itemsize
        ) / 1000

    @property
    def code(self) -> str:
        """The Python that rebuilds this adapter."""
        return adapter_code(self.config, self.source)

    @property
    def report(self) -> AdapterReport:
        """The adapter, layer by layer."""
        return report_of(self.spec, self.config, self.recoveries)
