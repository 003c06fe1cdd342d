"""What the adapter panel shows at one moment, as a value.

``Adapter.state`` returns it, and the views in ``qlab.views.adapter`` draw it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from qlab import registry
from qlab.core.adapt.recovery import Recovery
from qlab.core.adapt.report import AdapterReport, report_of
from qlab.core.config.code import adapter_code
from qlab.core.config.lora import LoRAConfig
from qlab.core.config.spec import ModelSpec
from qlab.core.config.train import TrainConfig
from qlab.core.progress import Progress

# why no initialization can compensate a quantization error
NO_ORIGINAL = (
    "The model came quantized and its original weights are not known; give Adapter the Quantizer."
)
NOT_QUANTIZED = (
    "The model is not quantized, so there is no error to make up for; give Adapter a Quantizer."
)


class KindChoice(NamedTuple):
    """A kind of adapter on the shelf, as the menu and the map need it.

    Attributes:
        name: the ``kind``.
        title: one line that says what it is.
        adapts: kinds of layers that it can change.
    """

    name: str
    title: str
    adapts: tuple[str, ...]


def kind_choices() -> tuple[KindChoice, ...]:
    """Return every kind of adapter on the shelf."""
    shelf = registry.shelf("adapters").values()
    return tuple(KindChoice(kind.name, kind.title, kind.adapts) for kind in shelf)


@dataclass(frozen=True, eq=False, kw_only=True)
class AdapterState:
    """One moment of an adapter panel.

    Attributes:
        spec: the model's layers.
        config: the adapter's settings.
        storage: how the base's weights are stored, in words.
        recoveries: what was measured of a layer, by path; None where it has no error.
        stale: whether ``recoveries`` belong to a storage chosen earlier.
        obstacle: why no initialization can compensate the quantization error; may be empty.
        origin: what trained parameters come from; empty while they are the initial ones.
        progress: the running job, or None.
        error: the last error in words, or an empty string.
        source: the name of the source in the code, ``model`` or ``q``.
        kinds: every kind of adapter on the shelf.
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
    kinds: tuple[KindChoice, ...] = field(default_factory=kind_choices)

    @property
    def optimizer(self) -> tuple[str, float]:
        """Name of the default optimizer, and its bytes of state per trainable parameter."""
        kind = TrainConfig().optimizer_kind
        parameters = 1000  # many, so that a fixed part does not count
        nbytes = kind.state_nbytes((parameters,), self.config.itemsize)
        return kind.label, nbytes / parameters

    @property
    def training_nbytes(self) -> int:
        """Bytes of the parameters, of as many gradients, and of the optimizer's state."""
        report = self.report
        _, optimizer_nbytes = self.optimizer
        return 2 * report.nbytes + round(report.size * optimizer_nbytes)

    @property
    def code(self) -> str:
        """The Python that rebuilds this adapter."""
        return adapter_code(self.config, self.source)

    @property
    def report(self) -> AdapterReport:
        """The adapter, layer by layer."""
        return report_of(self.spec, self.config, self.recoveries)
