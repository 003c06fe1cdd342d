"""The arrays of an adapter, initial or trained, and the model that runs with them.

``Adapter`` has one ``AdapterArrays``, which decides whether arrays still fit a config or new ones
are needed. A function that the adapter passes makes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from qlab.core.config.lora import LoRAConfig
from qlab.errors import ConfigError

# settings on which the shapes or the values of the arrays depend
_SHAPED_BY = ("kind", "rank", "keys", "num_layers", "init", "dtype")

Arrays = dict[str, Any]  # mlx arrays by path, such as model.layers.0.self_attn.q_proj.lora_a


class TrainedOn(NamedTuple):
    """What trained arrays belong to.

    Attributes:
        storage: how the base is stored.
        base: the model that they were trained on.
    """

    storage: Any
    base: Any


class AdapterArrays:
    """Arrays of one adapter: initial ones until trained ones are taken.

    Trained arrays stay until ``drop``, and with them the base that they were trained on.

    Attributes:
        origin: where trained arrays come from, in words; empty while the arrays are initial.
        version: a number that rises with every change of trained arrays.
        trained_on: the base of trained arrays; None while the arrays are initial.
    """

    def __init__(self) -> None:
        self.origin = ""
        self.version = 0
        self.trained_on: TrainedOn | None = None
        # each beside the settings that it was made for
        self._arrays: tuple[dict[str, Any], Arrays] | None = None
        self._adapted: tuple[Any, Any] | None = None

    def get(self, config: LoRAConfig, storage: Any, make: Callable[[], Arrays]) -> Arrays:
        """Return the arrays by path.

        Args:
            config: of the adapter.
            storage: of its base; initial arrays depend on it unless ``init`` is ``default``.
            make: returns initial arrays; called if there are none for this config and storage.
        """
        identity = self._identity(config, storage)
        if self._arrays is None or self._arrays[0] != identity:
            self._arrays = identity, make()
        return dict(self._arrays[1])

    def adapted(self, config: LoRAConfig, storage: Any, make: Callable[[], Any]) -> Any:
        """Return the model that runs with the arrays; made anew after a change."""
        identity = (self._identity(config, storage), config.scale, self.version)
        if self._adapted is None or self._adapted[0] != identity:
            self._adapted = identity, make()
        return self._adapted[1]

    def take(self, arrays: Arrays, config: LoRAConfig, trained_on: TrainedOn, origin: str) -> None:
        """Take trained arrays."""
        self.trained_on = trained_on
        self.origin = origin
        self.version += 1
        self._arrays = self._identity(config, trained_on.storage), arrays

    def drop(self) -> None:
        """Drop trained arrays; the next ``get`` makes initial ones."""
        self.trained_on = None
        self._arrays = None
        self._adapted = None
        self.origin = ""
        self.version += 1

    def check(self, config: LoRAConfig) -> None:
        """Refuse a config whose arrays would be others than the trained ones.

        Raises:
            ConfigError: names the first setting in the way.
        """
        if not self.origin or self._arrays is None:
            return
        identity = self._arrays[0]
        for name in _SHAPED_BY:
            if getattr(config, name) != identity[name]:
                raise ConfigError(
                    f"Another {name} would lose the parameters ({self.origin}); call reset() first."
                )

    def _identity(self, config: LoRAConfig, storage: Any) -> dict[str, Any]:
        """Return all that the arrays depend on."""
        shaped = {name: getattr(config, name) for name in _SHAPED_BY}
        if self.origin or config.init == "default":
            return shaped
        # an error-compensating initialization follows the base's error, and divides by the scale
        return {**shaped, "storage": storage, "scale": config.scale}
