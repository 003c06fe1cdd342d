"""Makes an earlier run again from its folder.

Its model loaded and quantized as it was, its adapter put on it. Wiring only.
"""

from __future__ import annotations

from pathlib import Path

from qlab.core.train.rows import Rows
from qlab.engine.models.fingerprint import fingerprint
from qlab.engine.train import checkpoint, run_folder
from qlab.errors import BusyError, ConfigError
from qlab.lab.adapter import Adapter
from qlab.lab.model import Model, load
from qlab.lab.quantizer import Quantizer
from qlab.runtime.job import mlx_call

_KEPT = (
    "kind",
    "rank",
    "scale",
    "dropout",
    "num_layers",
    "keys",
    "dtype",
    "rslora",
)  # of the adapter; its start is past


def rebuilt(
    path: str | Path, adapter: Adapter | None
) -> tuple[Path, Adapter, run_folder.RunFacts, Rows, Rows | None]:
    """Return a run's last checkpoint, its adapter with the checkpoint's parameters, and what else
    it was made of; blocks.

    Args:
        path: of the run, or of one of its checkpoints.
        adapter: on the same base; None loads and quantizes the base anew.

    Raises:
        LoadError: no checkpoint there opens, or the model is gone.
        ConfigError: base or adapter are not those that the run was made with.
        BusyError: another run trains the adapter.
    """
    found = checkpoint.latest(Path(path).expanduser())
    facts, rows, held = run_folder.read(found.parent)
    adapter = adapter or _adapter(facts)
    if adapter.run:
        raise BusyError(f"The run {adapter.run!r} trains this adapter; stop it first.")
    for name in _KEPT:
        if (ours := getattr(adapter.config, name)) != (its := getattr(facts.lora, name)):
            raise ConfigError(
                f"The adapter has {name}={ours!r}, and the run in {found.parent} {name}={its!r}."
            )
    if mlx_call(fingerprint, adapter.base.module) != facts.base:
        raise ConfigError(
            f"{adapter.model.name!r} is not the base that the run in {found.parent} was made with."
        )
    adapter.set_parameters(mlx_call(checkpoint.read_parameters, found), f"checkpoint {found.name}")
    return found, adapter, facts, rows, held


def _adapter(facts: run_folder.RunFacts) -> Adapter:
    if not facts.source:
        raise ConfigError(
            "The run does not say where its model came from; give Trainer.load the adapter."
        )
    return Adapter(source_of(facts), seed=facts.train.seed, **facts.lora.__dict__)


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
    for layer, own in facts.plan.overrides.items():
        quantizer.set(
            layer,
            own and own.bits,
            **({"group_size": own.group_size, "mode": own.mode} if own else {}),
        )
    quantizer.close()  # nobody looks at a panel of it
    return quantizer
