"""``estimate``: what training will take, before anything is loaded. Wiring only: source → forecast → estimate → panel."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from qlab.core.budget import budget
from qlab.core.config import QuantConfig, QuantPlan
from qlab.core.memory import LEVELS, EstimateTable, MemoryEstimate, Setup
from qlab.core.panel import Machine
from qlab.core.training import LoRAConfig, TrainConfig
from qlab.engine.device import machine as _machine
from qlab.engine.forecast import Forecast
from qlab.engine.job import mlx_call
from qlab.engine.structure import context, structure
from qlab.errors import ConfigError, LoadError, nearest
from qlab.model import Model

Source = Any  # a Model, a Quantizer, a config dict, a path or a hub id


def estimate(
    model: Source | Iterable[Source],
    quant: QuantConfig | QuantPlan | None | Iterable[QuantConfig | QuantPlan | None] = None,
    adapter: LoRAConfig | Iterable[LoRAConfig] | None = None,
    train: TrainConfig | Iterable[TrainConfig] | None = None,
    *,
    level: str = "formula",
    machine: Machine | str | float | None = None,
) -> Any:
    """Foresee the peak memory of training.

    Args:
        model: what ``qlab.load`` returned, a ``Quantizer`` (its plan counts), contents of a config.json, the path of one or
            of its folder, or a hub id. No weights are read.
        quant: storage of the weights; None leaves them as the config has them.
        adapter: None is ``LoRAConfig()``.
        train: None is ``TrainConfig()``.
        level: ``formula`` (at once), ``traced`` (seconds) or ``measured`` (runs one real step of a loaded model).
        machine: budget to judge by: a name such as ``"16 GB Mac"``, bytes, or None for this machine's free memory.

    Returns:
        A ``MemoryEstimate``; where any of the first four is a list, an ``EstimateTable`` of all combinations.

    Raises:
        LoadError: no such model, or of an unknown architecture.
        ConfigError: a setting is not legal, or does not fit the model.
        LayerNotFoundError: an override or an adapter's key names no layer.
    """
    if level not in LEVELS:
        raise ConfigError(f"level={level!r} is not legal; choose one of {', '.join(LEVELS)}.{nearest(level, LEVELS)}")
    given = (model, quant, adapter, train)
    sources, storages, loras, runs = (list(x) if isinstance(x, (list, tuple)) else [x] for x in given)
    rows = []
    for source in sources:
        forecast = _forecast(source)
        place = _place(source, forecast) if machine is None else budget(machine)
        for storage, lora, run in product(storages, loras, runs):
            setup = Setup(_plan(storage, source), _of(LoRAConfig, lora, "adapter"), _of(TrainConfig, run, "train"))
            rows.append(_estimate(forecast, setup, place, level))
    return EstimateTable(tuple(rows)) if any(isinstance(x, (list, tuple)) for x in given) else rows[0]


def _estimate(forecast: Forecast, setup: Setup, place: Machine, level: str) -> MemoryEstimate:
    def again(other: Setup) -> MemoryEstimate:
        return _estimate(forecast, other, place, "formula")

    return replace(mlx_call(forecast.estimate, setup, place, level), _again=again)


def _forecast(source: Any) -> Forecast:
    """Return what is known of a source; a second question of the same source finds the formulas of the first."""
    model = getattr(source, "model", source)  # of a quantizer
    if isinstance(model, Model):
        if model.module is None:
            raise LoadError(f"The model {model.name!r} was freed; load it again.")
        if model not in _LOADED:
            _LOADED[model] = mlx_call(Forecast, model.module, model.name, context(model.config), True)
        return _LOADED[model]
    if not isinstance(source, (dict, str, Path)):
        raise ConfigError(f"model={source!r} is not legal; give a model, a quantizer, a config, a path or a hub id.")
    return _opened(json.dumps(source, sort_keys=True, default=str) if isinstance(source, dict) else Path(source))


_LOADED: WeakKeyDictionary[Model, Forecast] = WeakKeyDictionary()


@lru_cache(maxsize=8)
def _opened(source: str | Path) -> Forecast:
    def work() -> Forecast:
        module, name, config, notes = structure(json.loads(source) if isinstance(source, str) else source)
        return Forecast(module, name, context(config), False, notes)

    return mlx_call(work)


def _place(source: Any, forecast: Forecast) -> Machine:
    """This machine; what a loaded model holds already counts as free, since the estimate counts it again."""
    here = mlx_call(_machine)
    return replace(here, free_nbytes=min(here.free_nbytes + forecast.held_nbytes, here.total_nbytes))


def _plan(storage: Any, source: Any) -> QuantPlan | None:
    if storage is None:
        return getattr(source, "plan", None) if hasattr(source, "model") else None
    if isinstance(storage, QuantConfig):
        return QuantPlan(storage)
    if isinstance(storage, QuantPlan):
        return storage
    raise ConfigError(f"quant={storage!r} is not legal; give a QuantConfig, a QuantPlan or None.")


def _of(kind: Any, value: Any, name: str) -> Any:
    if value is None:
        return kind()
    if isinstance(value, kind):
        return value
    raise ConfigError(f"{name}={value!r} is not legal; give a {kind.__name__} or None.")
