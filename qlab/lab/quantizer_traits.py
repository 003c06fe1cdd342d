"""The storage of a model as traits: what sliders, code and links share.

``Quantizer`` inherits it and adds what a choice costs. Everything here is known from the layers'
shapes alone; nothing is measured.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import traitlets as T

from qlab import registry
from qlab.core.config.code import code_line
from qlab.core.config.quant import QuantConfig, QuantPlan
from qlab.core.config.spec import ModelSpec
from qlab.errors import ConfigError, LayerNotFoundError, nearest

STORAGE_TRAITS = ("mode", "bits", "group_size", "solver", "overrides")
_AS_NOW: Any = object()  # the bits that the sliders show


def quant_config(mode: str, bits: int | None, group_size: int | None) -> QuantConfig:
    """Return a config; None takes the mode's default."""
    settings = {"bits": bits, "group_size": group_size}
    chosen = {name: value for name, value in settings.items() if value is not None}
    return QuantConfig(mode, **chosen)


class QuantizerChoice(T.HasTraits):
    """Traits that are a ``QuantPlan`` at any time.

    A value that is not legal is refused and leaves all traits as they were. A new ``mode`` takes
    ``bits`` and ``group_size`` along to the nearest values that it has.
    """

    mode = T.Unicode("affine")
    bits = T.Int(4)
    group_size = T.Int(64)
    solver = T.Unicode("rtn")
    overrides = T.Dict()  # by layer path; replaced as a whole, so that observers are called

    _spec: ModelSpec
    _last_config: QuantConfig | None = None
    _last_plan: tuple[dict[str, QuantConfig | None], QuantPlan] | None = None

    def __init__(self) -> None:
        super().__init__()
        self._change_lock = threading.RLock()  # cells and widgets change overrides at once

    @property
    def config(self) -> QuantConfig:
        """Storage of every layer that has no override."""
        return self._config_of(self.mode, self.bits, self.group_size)

    @property
    def plan(self) -> QuantPlan:
        """Storage of every layer; its repr pastes back."""
        config = self.config
        # one plan for one position of the sliders, however often it is asked for
        if self._last_plan is not None:
            overrides, plan = self._last_plan
            if plan.default is config and overrides == self.overrides:
                return plan
        overrides = dict(self.overrides)
        unlike_default = {path: own for path, own in overrides.items() if own != config}
        plan = QuantPlan(config, unlike_default)
        self._last_plan = overrides, plan
        return plan

    @property
    def code(self) -> str:
        """The Python that rebuilds this state."""
        return code_line(self.plan, self.solver)

    def set(
        self,
        path: str,
        bits: int | None = _AS_NOW,
        *,
        group_size: int | None = None,
        mode: str | None = None,
    ) -> None:
        """Give one layer, or all that match a pattern, a storage other than the default.

        Example:
            >>> q.set("model.layers.0.mlp.down_proj", bits=8)
            >>> q.set("*.v_proj", mode="mxfp8")
            >>> q.set("lm_head", bits=None)  # stays at 16 bits

        Args:
            path: of a layer, or a pattern such as ``*.down_proj``.
            bits: bits per code; None leaves the layer unquantized.
            group_size: None takes the present one, if the mode has it.
            mode: None takes the present one.

        Raises:
            LayerNotFoundError: nothing matches; names the nearest layer.
            ConfigError: the storage is not legal, or cannot hold the layer.
        """
        paths = self._matching(path)
        config = None
        if bits is not None:
            config = self._override(bits, group_size, mode)
            self._check_fits(paths, config)
        self._set_overrides(dict.fromkeys(paths, config))

    def unset(self, path: str = "*") -> None:
        """Drop the overrides of one layer, or of all that match a pattern.

        Raises:
            LayerNotFoundError: nothing matches.
        """
        dropped = set(self._matching(path))
        with self._change_lock:
            self.overrides = {
                path: config for path, config in self.overrides.items() if path not in dropped
            }

    # --- within -----------------------------------------------------------------------------------

    def _take(self, config: QuantConfig) -> None:
        """Set mode, bits and group size at once; observers are called when all three stand."""
        with self.hold_trait_notifications():
            self.mode = config.mode
            self.bits = config.bits
            self.group_size = config.group_size

    def _config_of(self, mode: str, bits: int, group_size: int) -> QuantConfig:
        """Return a config: the last one if it is the same, so that it is built and checked once."""
        last = self._last_config
        if last is None or (last.mode, last.bits, last.group_size) != (mode, bits, group_size):
            last = QuantConfig(mode, bits, group_size)
            self._last_config = last
        return last

    def _override(self, bits: int, group_size: int | None, mode: str | None) -> QuantConfig:
        mode = mode or self.mode
        if bits is _AS_NOW:
            bits = self.bits
        if not group_size and mode == self.mode:
            group_size = self.group_size
        return quant_config(mode, bits, group_size or None)

    def _set_overrides(self, overrides: Mapping[str, QuantConfig | None]) -> None:
        with self._change_lock:
            self.overrides = {**self.overrides, **overrides}

    def _check_fits(self, paths: list[str], config: QuantConfig) -> None:
        for path in paths:
            reason = self._spec[path].refusal(config)
            if reason:
                raise ConfigError(f"Layer {path!r} cannot be stored as {config.label}: {reason}.")

    def _matching(self, pattern: str) -> list[str]:
        paths = [layer.path for layer in self._spec.layers]
        matches = []
        if isinstance(pattern, str):
            matches = [path for path in paths if fnmatchcase(path, pattern)]
        if not matches:
            hint = nearest(pattern, paths)
            raise LayerNotFoundError(
                f"The model {self._spec.name!r} has no layer {pattern!r}.{hint}"
            )
        return matches

    @T.validate("mode")
    def _valid_mode(self, proposal: Any) -> str:
        return registry.get("schemes", proposal["value"]).name

    @T.validate("solver")
    def _valid_solver(self, proposal: Any) -> str:
        return registry.get("solvers", proposal["value"]).name

    @T.validate("bits", "group_size")
    def _valid_size(self, proposal: Any) -> int:
        name = proposal["trait"].name
        value = proposal["value"]
        # checked alone: while a new mode is set, the other one may still be that of the old mode
        scheme = registry.get("schemes", self.mode)
        legal = scheme.bits if name == "bits" else scheme.group_sizes
        if value not in legal or isinstance(value, bool):
            QuantConfig(self.mode, **{name: value})  # raises, and names the nearest legal value
        return value

    @T.validate("overrides")
    def _valid_overrides(self, proposal: Any) -> dict[str, QuantConfig | None]:
        plan = QuantPlan(self.config, proposal["value"])
        return {self._spec[path].path: config for path, config in plan.overrides.items()}

    @T.observe("mode")
    def _follow_mode(self, change: Any) -> None:
        scheme = registry.get("schemes", self.mode)
        with self.hold_trait_notifications():
            self.bits = min(scheme.bits, key=lambda bits: abs(bits - self.bits))
            self.group_size = min(scheme.group_sizes, key=lambda size: abs(size - self.group_size))
