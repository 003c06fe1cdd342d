"""Keeps the traits of a quantizer or an adapter and a setup the same, in both directions.

Knows no model and shows nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qlab.core.config.lora import LoRAConfig
from qlab.core.memory.setup import Setup

_STORAGE = ("mode", "bits", "group_size", "overrides")
_SIZE = ("rank", "scale", "num_layers")


def config_of(source: Any) -> LoRAConfig | None:
    """Return the adapter that a source brings along."""
    found = getattr(source, "config", None)
    return found if isinstance(found, LoRAConfig) else None


class Link:
    """Traits of a quantizer or an adapter that move together with the sliders of an estimate.

    Args:
        source: what was estimated; an adapter brings the quantizer along that its base follows.
        storage: whether its storage counts, not one given beside it.
        size: whether its adapter counts.
    """

    def __init__(self, source: Any, storage: bool, size: bool) -> None:
        holder = source if hasattr(source, "bits") else getattr(source, "quantizer", None)
        self._source = source
        self.storage = holder if storage and hasattr(holder, "observe") else None
        self.adapter = source if size and hasattr(source, "observe") and config_of(source) else None

    @property
    def label(self) -> str:
        """What moves along, in a word."""
        return (
            "quantizer"
            if self.storage is not None
            else "adapter"
            if self.adapter is not None
            else ""
        )

    def follow(self, heard: Any) -> None:
        """Call ``heard`` with every change of a trait."""
        for holder, names in ((self.storage, _STORAGE), (self.adapter, _SIZE)):
            if holder is not None:
                holder.observe(heard, list(names))

    def leave(self, heard: Any) -> None:
        """Stop to call."""
        for holder, names in ((self.storage, _STORAGE), (self.adapter, _SIZE)):
            if holder is not None:
                holder.unobserve(heard, list(names))

    def pull(self, setup: Setup) -> Setup:
        """Return a setup as the traits have it now."""
        plan = (
            self._source.plan if self.storage is not None else setup.plan
        )  # a trained adapter stays on its base
        return replace(
            setup,
            plan=plan,
            adapter=self.adapter.config if self.adapter is not None else setup.adapter,
        )

    def push(self, setup: Setup) -> None:
        """Set the traits as a setup has them."""
        plan = setup.plan
        lora = setup.adapter
        held = getattr(self._source, "quantizer", self.storage) is not self.storage
        if self.storage is not None and not held and plan is not None and plan != self.storage.plan:
            with self.storage.hold_trait_notifications():
                default = plan.default
                self.storage.mode = default.mode
                self.storage.bits = default.bits
                self.storage.group_size = default.group_size
                self.storage.overrides = dict(plan.overrides)
        if self.adapter is not None and lora != self.adapter.config:
            with self.adapter.hold_trait_notifications():
                self.adapter.rank = lora.rank
                self.adapter.scale = lora.scale
                self.adapter.num_layers = lora.num_layers
