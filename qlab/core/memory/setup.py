"""``Setup``: what an estimate is asked of: storage, adapter and run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from qlab.core.config.lora import LoRAConfig
from qlab.core.config.quant import QuantConfig, QuantPlan
from qlab.core.config.train import TrainConfig

SOLVABLE = ("max_seq_length", "batch_size", "rank", "num_layers", "bits")


@dataclass(frozen=True)
class Setup:
    """What is estimated.

    Attributes:
        plan: storage of the weights; None leaves them as they are.
        adapter: the adapter.
        train: the run.
    """

    plan: QuantPlan | None = None
    adapter: LoRAConfig = field(default_factory=LoRAConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def label(self) -> str:
        """Short name for tables."""
        own = f" + {len(self.plan.overrides)} own" if self.plan and self.plan.overrides else ""
        return f"{self.plan.default.label}{own}" if self.plan else "as stored"

    def with_value(self, name: str, value: Any) -> Setup:
        """Return a setup with one of ``SOLVABLE``, or any field of the adapter or the run, changed."""
        if name == "bits":
            default = self.plan.default if self.plan else QuantConfig()
            return replace(
                self, plan=QuantPlan(QuantConfig(default.mode, value, default.group_size), {})
            )
        if name in LoRAConfig.__dataclass_fields__:
            made = replace(self.adapter, **{name: value})
            return replace(
                self, adapter=made.with_alpha(self.adapter.alpha) if name == "rank" else made
            )
        return replace(self, train=replace(self.train, **{name: value}))
