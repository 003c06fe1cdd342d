"""An adapter's settings as traits: what sliders, code and links share.

``Adapter`` inherits it and adds the model. Nothing here knows a model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import traitlets as T

from qlab.core.config.lora import LoRAConfig

TRAITS = ("kind", "rank", "scale", "dropout", "keys", "num_layers", "init", "rslora")


class AdapterChoice(T.HasTraits):
    """Traits that are a ``LoRAConfig`` at any time.

    A change that ``_allow`` refuses raises its error and leaves all traits as they were.
    """

    kind = T.Unicode("lora")
    rank = T.Int(8)
    scale = T.Float(2.0)
    dropout = T.Float(0.0)
    keys: Any = T.Any(None)
    num_layers = T.Int(-1)
    init = T.Unicode("default")
    rslora = T.Bool(False)

    _dtype = "float32"  # not a trait: no control moves it

    def _allow(self, config: LoRAConfig) -> None:
        """Raise if a config is not possible here; without a model every config is."""

    @property
    def config(self) -> LoRAConfig:
        """The adapter as a value; its repr pastes back."""
        settings = {name: getattr(self, name) for name in TRAITS}
        return LoRAConfig(dtype=self._dtype, **settings)

    @property
    def alpha(self) -> float:
        """Scale × rank; with ``rslora`` scale × √rank. A change of the rank leaves the scale."""
        return self.config.alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        self.scale = self.config.with_alpha(value).scale

    def _take(self, config: LoRAConfig) -> None:
        """Set all traits at once; they are checked together."""
        self._allow(config)
        self._dtype = config.dtype
        with self.hold_trait_notifications():
            for name in TRAITS:
                setattr(self, name, getattr(config, name))

    @T.validate(*TRAITS)
    def _valid(self, proposal: Any) -> Any:
        name = proposal["trait"].name
        changed = replace(self.config, **{name: proposal["value"]})
        self._allow(changed)
        return getattr(changed, name)
