"""Keeps the traits of a quantizer or an adapter and the sliders of an estimate the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from qlab.core.config.lora import LoRAConfig
from qlab.core.config.quant import QuantPlan
from qlab.core.memory.setup import Setup

_STORAGE_TRAITS = ["mode", "bits", "group_size", "overrides"]
_ADAPTER_TRAITS = ["rank", "scale", "num_layers"]


def config_of(source: Any) -> LoRAConfig | None:
    """Return the adapter config that a source brings along, or None if it is no adapter."""
    config = getattr(source, "config", None)
    return config if isinstance(config, LoRAConfig) else None


class TraitLink:
    """Traits of a quantizer or an adapter that move together with the sliders of an estimate.

    Args:
        source: what was estimated; an adapter brings the quantizer along that its base follows.
        storage: whether the source's storage counts, and not one passed beside it.
        size: whether the source's adapter counts, and not one passed beside it.

    Attributes:
        storage: the ``Quantizer`` that is linked, or None.
        adapter: the ``Adapter`` that is linked, or None.
    """

    def __init__(self, source: Any, storage: bool, size: bool) -> None:
        self._source = source
        self.storage = _quantizer_of(source) if storage else None
        is_adapter = hasattr(source, "observe") and config_of(source) is not None
        self.adapter = source if size and is_adapter else None

    @property
    def label(self) -> str:
        """What moves along: ``quantizer``, ``adapter`` or nothing."""
        if self.storage is not None:
            return "quantizer"
        if self.adapter is not None:
            return "adapter"
        return ""

    def observe(self, on_change: Callable[[Any], None]) -> None:
        """Call a function with every change of a linked trait."""
        for holder, names in self._linked():
            holder.observe(on_change, names)

    def unobserve(self, on_change: Callable[[Any], None]) -> None:
        """Undo ``observe``."""
        for holder, names in self._linked():
            holder.unobserve(on_change, names)

    def _linked(self) -> Iterator[tuple[Any, list[str]]]:
        if self.storage is not None:
            yield self.storage, _STORAGE_TRAITS
        if self.adapter is not None:
            yield self.adapter, _ADAPTER_TRAITS

    def read(self, setup: Setup) -> Setup:
        """Return a setup with the values that the traits have now."""
        if self.storage is not None:
            # asked of the source: once an adapter is trained, its base no longer follows
            setup = replace(setup, plan=self._source.plan)
        if self.adapter is not None:
            setup = replace(setup, adapter=self.adapter.config)
        return setup

    def write(self, setup: Setup) -> None:
        """Set the traits to the values of a setup."""
        if setup.plan is not None:
            self._write_plan(setup.plan)
        lora = setup.adapter
        adapter = self.adapter
        if adapter is not None and lora != adapter.config:
            with adapter.hold_trait_notifications():
                adapter.rank = lora.rank
                adapter.scale = lora.scale
                adapter.num_layers = lora.num_layers

    def _write_plan(self, plan: QuantPlan) -> None:
        quantizer = self.storage
        if quantizer is None or plan == quantizer.plan:
            return
        # an adapter that was trained lets go of its quantizer, which is then no longer moved
        if getattr(self._source, "quantizer", quantizer) is not quantizer:
            return
        with quantizer.hold_trait_notifications():
            quantizer.mode = plan.default.mode
            quantizer.bits = plan.default.bits
            quantizer.group_size = plan.default.group_size
            quantizer.overrides = dict(plan.overrides)


def _quantizer_of(source: Any) -> Any:
    """Return a quantizer, the quantizer that an adapter's base follows, or None."""
    quantizer = source if hasattr(source, "bits") else getattr(source, "quantizer", None)
    return quantizer if hasattr(quantizer, "observe") else None
