"""The frozen model under an adapter: a model as it came, or what a quantizer makes of it.

``Adapter`` asks it for the base, and for what is known of the weights before quantization.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from qlab.core.config.quant import QuantPlan
from qlab.core.panels.adapter import NO_ORIGINAL, NOT_QUANTIZED
from qlab.errors import ConfigError
from qlab.lab.model import Model
from qlab.lab.quantizer import Quantizer
from qlab.lab.quantizer_traits import STORAGE_TRAITS


class Storage(NamedTuple):
    """How a base is stored; bases of equal storage are the same.

    Attributes:
        plan: storage of every layer; None if the model stays as it came.
        solver: by which the codes are chosen; empty if the model stays as it came.
    """

    plan: QuantPlan | None
    solver: str


class AdapterBase:
    """Gives the model that an adapter is put on.

    Args:
        source: a model, or a quantizer whose plan is carried out when the base is first needed.

    Attributes:
        model: what was given: the model, or the quantizer's.
        quantizer: what was given, if it was a quantizer.
    """

    def __init__(self, source: Model | Quantizer) -> None:
        if not isinstance(source, (Model, Quantizer)):
            raise ConfigError(f"source={source!r} is not legal; give a model or a Quantizer.")
        self.quantizer = source if isinstance(source, Quantizer) else None
        self.model = source.model if isinstance(source, Quantizer) else source
        self._built: tuple[Storage, Model] | None = None  # one: it is as large as the model

    @property
    def storage(self) -> Storage:
        """How the base is stored, as the quantizer's sliders stand now."""
        if self.quantizer is not None:
            return Storage(self.quantizer.plan, self.quantizer.solver)
        return Storage(self.model.plan, "")

    def build(self) -> Model:
        """Return the base; a quantizer's plan is carried out at first use. Blocks."""
        if self.quantizer is None:
            return self.model
        storage = self.storage
        if self._built is None or self._built[0] != storage:
            self._built = storage, self.quantizer.quantize()
        return self._built[1]

    def forget(self) -> None:
        """Let go of a base that was built."""
        self._built = None

    @property
    def original(self) -> Model | None:
        """The model before it was quantized; None if that is not known."""
        if self.quantizer is None and self.model.spec.storage:
            return None
        return self.model

    @property
    def obstacle(self) -> str:
        """Why no initialization can compensate a quantization error; empty if one can."""
        if self.quantizer is not None:
            return ""
        if self.original is None:
            return NO_ORIGINAL
        return NOT_QUANTIZED

    def observe(self, on_change: Callable[[Any], None]) -> None:
        """Call a function at every change of the storage."""
        if self.quantizer is not None:
            self.quantizer.observe(on_change, list(STORAGE_TRAITS))

    def unobserve(self, on_change: Callable[[Any], None]) -> None:
        """Stop calling it."""
        if self.quantizer is not None:
            self.quantizer.unobserve(on_change, list(STORAGE_TRAITS))
