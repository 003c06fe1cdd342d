"""Loads an earlier run from its folder: its model, quantized as it was, and its adapter.

``Trainer.load`` and ``qlab.run`` call this.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from qlab.core.config.lora import LoRAConfig
from qlab.core.train.rows import Rows
from qlab.engine.models.fingerprint import fingerprint
from qlab.engine.train import checkpoint, run_folder
from qlab.errors import ConfigError
from qlab.lab.adapter import Adapter
from qlab.lab.model import Model, load
from qlab.lab.quantizer import Quantizer
from qlab.runtime.job import mlx_call
from qlab.runtime.paths import users_path


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """A run as it was loaded from its folder.

    Attributes:
        checkpoint: folder of the checkpoint to go on from.
        adapter: adapter with the parameters of the checkpoint.
        facts: its settings.
        rows: rows to train on.
        held_out: rows for validation, or None.
    """

    checkpoint: Path
    adapter: Adapter
    facts: run_folder.RunFacts
    rows: Rows
    held_out: Rows | None


def stored_run(path: str | Path, adapter: Adapter | None) -> StoredRun:
    """Load a run's last checkpoint with its settings and rows; blocks.

    Args:
        path: folder of the run, or of one of its checkpoints.
        adapter: adapter on the same base; None loads and quantizes the base anew.

    Raises:
        LoadError: no checkpoint there opens, or the model is gone.
        ConfigError: base or adapter are not those that the run was made with.
        BusyError: another run trains the adapter.
    """
    folder = checkpoint.latest(users_path(path))
    facts, rows, held_out = run_folder.read(folder.parent)
    adapter = adapter or _adapter(facts)
    adapter.check_not_in_training()
    _check_same_config(adapter.config, facts.lora, folder.parent)
    if mlx_call(fingerprint, adapter.base.module) != facts.base:
        raise ConfigError(
            f"{adapter.model.name!r} is not the base that the run in {folder.parent} was made with."
        )
    parameters = mlx_call(checkpoint.read_parameters, folder)
    adapter.set_parameters(parameters, f"checkpoint {folder.name}")
    return StoredRun(checkpoint=folder, adapter=adapter, facts=facts, rows=rows, held_out=held_out)


def _check_same_config(config: LoRAConfig, stored: LoRAConfig, folder: Path) -> None:
    name = config.first_difference(stored, but=("init",))  # the adapter is trained by now
    if name:
        present = getattr(config, name)
        wanted = getattr(stored, name)
        raise ConfigError(
            f"The adapter has {name}={present!r}, and the run in {folder} {name}={wanted!r}."
        )


def _adapter(facts: run_folder.RunFacts) -> Adapter:
    if not facts.source:
        raise ConfigError(
            "The run does not say where its model came from; give Trainer.load the adapter."
        )
    return Adapter(source_of(facts), seed=facts.train.seed, **asdict(facts.lora))


def source_of(facts: run_folder.RunFacts) -> Model | Quantizer:
    """Return a run's model; with a plan, the quantizer that carries it out.

    Raises:
        LoadError: the model is gone.
        ConfigError, LayerNotFoundError: the plan does not fit it.
    """
    model = load(facts.source)
    if facts.plan is None:
        return model
    default = facts.plan.default
    quantizer = Quantizer(
        model,
        bits=default.bits,
        group_size=default.group_size,
        mode=default.mode,
        solver=facts.solver,
    )
    for layer, config in facts.plan.overrides.items():
        if config is None:
            quantizer.set(layer, None)
        else:
            quantizer.set(layer, config.bits, group_size=config.group_size, mode=config.mode)
    quantizer.close()  # its panel is never shown
    return quantizer
