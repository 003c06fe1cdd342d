"""The arrays that an adapter has: made at first use, or trained; and the model that runs with them.

Knows no traits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qlab.core.config.lora import LoRAConfig
from qlab.errors import ConfigError

_SHAPED_BY = ("kind", "rank", "keys", "num_layers", "init", "dtype")  # what arrays belong to


class Held:
    """Arrays of one adapter.

    Trained ones stay until they are dropped, and hold the base that they were trained on.

    Attributes:
        origin: where trained ones come from, in words; empty until there are some.
        version: rises with every change of trained ones.
        pinned: how the base of trained ones is stored, and the base; None until there are some.
    """

    def __init__(self) -> None:
        self.origin = ""
        self.version = 0
        self.pinned: tuple[Any, Any] | None = None
        self._arrays: tuple[Any, dict[str, Any]] | None = None  # with what they belong to
        self._twin: tuple[Any, Any] | None = None

    def arrays(
        self, config: LoRAConfig, stored: Any, make: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Return the arrays, by path.

        Made anew if they belong to another config or, with a start of their own, storage.
        """
        of = self._of(config, stored)
        found = self._arrays
        if found is None or found[0] != of:
            found = self._arrays = (of, make())
        return dict(found[1])

    def twin(self, config: LoRAConfig, stored: Any, make: Callable[[], Any]) -> Any:
        """Return the model that runs with the arrays; made anew after a change."""
        of = (self._of(config, stored), config.scale, self.version)
        found = self._twin
        if found is None or found[0] != of:
            found = self._twin = (of, make())
        return found[1]

    def take(
        self, arrays: dict[str, Any], config: LoRAConfig, pinned: tuple[Any, Any], origin: str
    ) -> None:
        """Take trained arrays."""
        self.pinned = pinned
        self.origin = origin
        self.version = self.version + 1
        self._arrays = (self._of(config, None), arrays)

    def drop(self) -> None:
        """Go back to none."""
        self.pinned = self._arrays = self._twin = None
        self.origin = ""
        self.version = self.version + 1

    def check(self, config: LoRAConfig) -> None:
        """Refuse a config that trained arrays would not survive.

        Raises:
            ConfigError: names the setting.
        """
        if self.origin and (
            lost := [name for name in _SHAPED_BY if getattr(config, name) != self._arrays[0][name]]
        ):
            raise ConfigError(
                f"Another {lost[0]} would lose the parameters ({self.origin}); call reset() first."
            )

    def _of(self, config: LoRAConfig, stored: Any) -> Any:
        shaped = {name: getattr(config, name) for name in _SHAPED_BY}
        return (
            shaped
            if self.origin or config.init == "default"
            else {**shaped, "of": stored, "scale": config.scale}
        )
