"""``qlab.estimate``: what training will take, before anything is loaded.

Source → forecast (the engine's, on the MLX thread) → ``Estimate``, or a table of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, TypeAlias, overload

from qlab.core.config.legal import check_choice
from qlab.core.config.lora import LoRAConfig
from qlab.core.config.quant import QuantConfig, QuantPlan
from qlab.core.config.train import TrainConfig
from qlab.core.machine import Machine, budget
from qlab.core.memory.estimate import LEVELS
from qlab.core.memory.table import EstimateTable
from qlab.engine.step.blockwise import WINDOWS
from qlab.errors import ConfigError
from qlab.lab.estimate import Estimate
from qlab.lab.estimate_link import TraitLink
from qlab.lab.estimate_source import forecast_of, setup_of, this_machine
from qlab.runtime.device import backend
from qlab.runtime.job import mlx_call

Source: TypeAlias = Any  # a Model, a Quantizer, an Adapter, a config dict, a path or a hub id
Storage: TypeAlias = QuantConfig | QuantPlan | None
Budget: TypeAlias = Machine | str | float | None


@overload
def estimate(
    model: list[Source],
    quant: Storage | Sequence[Storage] = None,
    adapter: LoRAConfig | Sequence[LoRAConfig] | None = None,
    train: TrainConfig | Sequence[TrainConfig] | None = None,
    *,
    level: str = "formula",
    machine: Budget = None,
) -> EstimateTable[Estimate]: ...


@overload
def estimate(
    model: Source,
    quant: Sequence[Storage],
    adapter: LoRAConfig | Sequence[LoRAConfig] | None = None,
    train: TrainConfig | Sequence[TrainConfig] | None = None,
    *,
    level: str = "formula",
    machine: Budget = None,
) -> EstimateTable[Estimate]: ...


@overload
def estimate(
    model: Source,
    quant: Storage = None,
    adapter: LoRAConfig | None = None,
    train: TrainConfig | None = None,
    *,
    level: str = "formula",
    machine: Budget = None,
) -> Estimate: ...


@overload  # a list of adapters or of runs
def estimate(
    model: Source,
    quant: Storage | Sequence[Storage] = None,
    adapter: LoRAConfig | Sequence[LoRAConfig] | None = None,
    train: TrainConfig | Sequence[TrainConfig] | None = None,
    *,
    level: str = "formula",
    machine: Budget = None,
) -> Estimate | EstimateTable[Estimate]: ...


def estimate(
    model: Source | list[Source],
    quant: Storage | Sequence[Storage] = None,
    adapter: LoRAConfig | Sequence[LoRAConfig] | None = None,
    train: TrainConfig | Sequence[TrainConfig] | None = None,
    *,
    level: str = "formula",
    machine: Budget = None,
) -> Estimate | EstimateTable[Estimate]:
    """Estimate the peak memory of training, from a model's structure alone.

    Example:
        >>> est = qlab.estimate("demo", qlab.QuantConfig(bits=4), machine="16 GB Mac")
        >>> est                                     # last line of a cell: the panel
        >>> est.total_nbytes, est.fits()
        >>> est.solve("max_seq_length")             # the longest rows that fit
        >>> qlab.estimate("demo", [qlab.QuantConfig(bits=b) for b in (3, 4, 8)])    # a table

    Args:
        model: what ``qlab.load`` returned, a ``Quantizer`` or an ``Adapter`` (their plan and config
            count), contents of a config.json, the path of one or of its folder, or a hub id. No
            weights are read.
        quant: storage of the weights; None leaves them as the config, or the quantizer, has them.
        adapter: None is the adapter's own config, or ``LoRAConfig()``.
        train: None is ``TrainConfig()``.
        level: ``formula`` (at once), ``traced`` (seconds) or ``measured`` (runs one real step of a
            loaded model).
        machine: budget to compare with: a name such as ``"16 GB Mac"``, bytes, or None for this
            machine's free memory.

    Returns:
        An ``Estimate``; where any of the first four is a list, an ``EstimateTable`` of all
        combinations.

    Raises:
        LoadError: no such model, or of an unknown architecture.
        ConfigError: a setting is not legal, or does not fit the model.
        LayerNotFoundError: an override or an adapter's key names no layer.
    """
    check_choice("level", level, LEVELS)
    models = _listed(model, "model")
    storages = _listed(quant, "quant")
    adapters = _listed(adapter, "adapter")
    runs = _listed(train, "train")
    rows = []
    for source in models:
        forecast = forecast_of(source)
        place = this_machine(forecast) if machine is None else budget(machine)
        for storage, lora, run in product(storages, adapters, runs):
            setup = setup_of(source, storage, lora, run)
            link = TraitLink(source, storage=storage is None, size=lora is None)
            rows.append(Estimate.of(forecast, setup, place, level=level, link=link))
    is_table = any(isinstance(value, (list, tuple)) for value in (model, quant, adapter, train))
    return EstimateTable(tuple(rows)) if is_table else rows[0]


def _listed(value: Any, name: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        return [value]
    if not value:
        raise ConfigError(f"{name}=[] is empty; give at least one.")
    return list(value)


def with_largest_window(est: Estimate) -> Estimate:
    """Return an estimate of a step with as many blocks in flight as pay here and surely fit.

    The window of a blockwise step trades memory for speed. A window that the user set stays, and so
    does a step without checkpoints, which has none. If no window fits, the smallest is taken.
    """
    train = est.setup.train
    smallest, *larger = WINDOWS[mlx_call(backend)]
    if train.window or not train.grad_checkpoint or not larger:
        return est
    for window in reversed(larger):
        candidate = est.at(est.setup.with_value("window", window))
        if candidate.high_nbytes <= est.machine.free_nbytes:
            return candidate
    return est.at(est.setup.with_value("window", smallest))
