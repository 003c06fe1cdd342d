"""``Setup``: the settings that an estimate is made for: storage of the weights, adapter and run."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from qlab.core.config.lora import LoRAConfig
from qlab.core.config.quant import QuantConfig, QuantPlan
from qlab.core.config.train import TrainConfig

SOLVABLE = ("max_seq_length", "batch_size", "rank", "num_layers", "bits")

_ADAPTER_SETTINGS = {f.name for f in fields(LoRAConfig)}


@dataclass(frozen=True)
class Setup:
    """The settings that an estimate is made for: storage, adapter and run.

    Example:
        >>> setup = Setup(qlab.QuantPlan(qlab.QuantConfig(bits=4)))
        >>> setup.with_value("batch_size", 8).train.batch_size
        8

    Attributes:
        plan: storage of the weights; None leaves them as they are.
        adapter: the adapter.
        train: the run.
    """

    plan: QuantPlan | None = None
    adapter: LoRAConfig = field(default_factory=LoRAConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def default(self) -> QuantConfig:
        """Storage of the layers without an override; ``QuantConfig()`` without a plan."""
        return self.plan.default if self.plan else QuantConfig()

    @property
    def label(self) -> str:
        """Short name of the storage, for tables."""
        if self.plan is None:
            return "as stored"
        count = len(self.plan.overrides)
        overrides = f" + {count} own" if count else ""
        return f"{self.plan.default.label}{overrides}"

    def with_value(self, name: str, value: Any) -> Setup:
        """Return a setup with one setting changed.

        Args:
            name: ``bits``, or any field of ``LoRAConfig`` or ``TrainConfig``. A change of ``bits``
                drops overrides; a change of ``rank`` leaves alpha as it was.
            value: of the setting.
        """
        if name == "bits":
            config = QuantConfig(self.default.mode, value, self.default.group_size)
            return replace(self, plan=QuantPlan(config, {}))
        if name not in _ADAPTER_SETTINGS:
            return replace(self, train=replace(self.train, **{name: value}))
        adapter = replace(self.adapter, **{name: value})
        if name == "rank":
            adapter = adapter.with_alpha(self.adapter.alpha)
        return replace(self, adapter=adapter)
