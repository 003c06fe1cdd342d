"""Turns the arguments of ``qlab.estimate`` into a forecast and a setup."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from qlab.core.config.lora import LoRAConfig
from qlab.core.config.quant import QuantConfig, QuantPlan
from qlab.core.config.train import TrainConfig
from qlab.core.machine import Machine
from qlab.core.memory.setup import Setup
from qlab.engine.io.config_file import context, structure
from qlab.engine.memory.forecast import Forecast
from qlab.errors import ConfigError
from qlab.lab.estimate_link import config_of
from qlab.lab.model import Model
from qlab.runtime.device import machine as device_machine
from qlab.runtime.job import mlx_call

Config = TypeVar("Config", LoRAConfig, TrainConfig)

_FORECASTS: WeakKeyDictionary[Model, Forecast] = WeakKeyDictionary()  # of loaded models


def forecast_of(source: Any) -> Forecast:
    """Return the forecast of a source; a second question finds the formulas of the first.

    Args:
        source: a Model, a Quantizer, an Adapter, a config dict, a path or a hub id.

    Raises:
        LoadError: no such model, or of an unknown architecture.
        ConfigError: the source is none of these.
    """
    model = getattr(source, "model", source)  # of a quantizer or an adapter
    if isinstance(model, Model):
        return _forecast_of_model(model)
    if isinstance(source, dict):
        return _forecast_of_config(json.dumps(source, sort_keys=True, default=str))
    if isinstance(source, (str, Path)):
        return _forecast_of_config(Path(source))
    legal = "a model, a quantizer, a config, a path or a hub id"
    raise ConfigError(f"model={source!r} is not legal; give {legal}.")


def _forecast_of_model(model: Model) -> Forecast:
    module = model.module  # refuses one that was freed, so it comes before the look-up
    if model not in _FORECASTS:
        _FORECASTS[model] = mlx_call(
            Forecast, module, model.name, context=context(model.config), loaded=True
        )
    return _FORECASTS[model]


@lru_cache(maxsize=8)
def _forecast_of_config(source: str | Path) -> Forecast:
    """Return the forecast of a config's JSON text, of a path or of a hub id."""
    config_or_path = json.loads(source) if isinstance(source, str) else source

    def work() -> Forecast:
        module, name, config, notes = structure(config_or_path)
        return Forecast(module, name, context=context(config), notes=notes)

    return mlx_call(work)


def this_machine(forecast: Forecast) -> Machine:
    """Return this machine, with the memory that a loaded model takes counted as free.

    The estimate counts the model's weights again.
    """
    here = mlx_call(device_machine)
    free = min(here.free_nbytes + forecast.loaded_nbytes, here.total_nbytes)
    return replace(here, free_nbytes=free)


def setup_of(source: Any, storage: Any, lora: Any, train: Any) -> Setup:
    """Return the setup of one combination; what is None comes from the source or the defaults.

    Raises:
        ConfigError: one of them is of the wrong type.
    """
    adapter = config_of(source) if lora is None else lora
    return Setup(
        _plan(storage, source),
        _checked(LoRAConfig, adapter, "adapter"),
        _checked(TrainConfig, train, "train"),
    )


def _plan(storage: Any, source: Any) -> QuantPlan | None:
    if storage is None:
        # a model's own plan is not asked for: its weights are stored that way already
        is_facade = hasattr(source, "model")
        return getattr(source, "plan", None) if is_facade else None
    if isinstance(storage, QuantConfig):
        return QuantPlan(storage)
    if isinstance(storage, QuantPlan):
        return storage
    raise ConfigError(f"quant={storage!r} is not legal; give a QuantConfig, a QuantPlan or None.")


def _checked(kind: type[Config], value: Any, name: str) -> Config:
    if value is None:
        return kind()
    if isinstance(value, kind):
        return value
    raise ConfigError(f"{name}={value!r} is not legal; give a {kind.__name__} or None.")
