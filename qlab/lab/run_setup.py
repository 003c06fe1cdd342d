"""Makes a run ready, and takes it elsewhere.

Its folder, its settings as a file for ``qlab.run`` or mlx-lm. Wiring only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlab.core.config.lora import LoRAConfig
from qlab.core.config.train import TrainConfig
from qlab.core.train.rows import Rows
from qlab.engine.adapt.files import save_adapter
from qlab.engine.data.batches import Feed
from qlab.engine.models.fingerprint import fingerprint
from qlab.engine.train import mlx_recipe as recipe
from qlab.engine.train import run_file, run_folder
from qlab.engine.train import setup as prepare
from qlab.engine.train.checkpoint import Checkpoints, TrainState
from qlab.engine.train.distributed import ALONE, Ranks
from qlab.engine.train.session import Made
from qlab.errors import ConfigError
from qlab.lab.model import Model
from qlab.runtime.job import mlx_call


def ready(
    base: Model,
    lora: LoRAConfig,
    config: TrainConfig,
    feed: Feed,
    held: Rows | None,
    parameters: Any,
    path: Path,
    on_good: Callable[[TrainState], None],
    found: Path | None = None,
    ranks: Ranks = ALONE,
) -> Made:
    """Return a run on a base, where it stands, and what to know about how it is computed.

    Runs on the MLX thread.

    Args:
        base: frozen.
        lora: the adapter.
        config: the run, its blocks in flight chosen.
        feed: batches to train on.
        held: rows to judge by.
        parameters: the adapter's arrays by path, evaluated.
        path: folder of the checkpoints.
        on_good: see ``Task``.
        found: checkpoint to go on from, or None.
        ranks: the processes that train together.

    Raises:
        ConfigError, LayerNotFoundError, UnsupportedError: see ``setup.make_task``.
        LoadError: the checkpoint cannot be read.
    """
    kept = Checkpoints(
        path, lambda folder, arrays: save_adapter(folder, arrays, lora, base.spec, base.source)
    )
    batches = prepare.validation_batches(held, config)
    given = (base.module, base.spec, lora, config, feed, batches, parameters, kept, on_good)
    task, state, notes = prepare.make_task(*given, ranks=ranks)
    return task, prepare.resumed(found, parameters, task) if found else state, notes


def facts_of(
    base: Model, lora: LoRAConfig, config: TrainConfig, prompts: tuple[str, ...]
) -> run_folder.RunFacts:
    """Return what the folder of a run says of it. Runs on the MLX thread."""
    whole = fingerprint(base.module)
    return run_folder.RunFacts(base.source, base.plan, base.solver, lora, config, whole, prompts)


def keep(
    path: Path,
    base: Model,
    lora: LoRAConfig,
    config: TrainConfig,
    rows: Rows,
    held: Rows | None,
    prompts: tuple[str, ...],
) -> run_folder.RunFacts:
    """Write what a run is made of to its folder, and return it. Runs on the MLX thread.

    Raises:
        SaveError: the place cannot be written.
    """
    facts = facts_of(base, lora, config, prompts)
    run_folder.write(path, facts, rows, held)
    return facts


def to_yaml(trainer: Any, data: str | None, model: str | None) -> str:
    """See ``Trainer.to_yaml``."""
    adapter = trainer.adapter
    base = trainer.adapter.base
    lora = trainer.adapter.config
    config = trainer.config
    if data is not None:
        if model is None and base.plan is not None:
            raise ConfigError(
                "The base was quantized here; save it with a.base.save(path) and give model=path."
            )
        kind = trainer.rows.kind
        iters = trainer.report.iters
        return recipe.to_yaml(
            model or base.source, base.spec, lora, config, data, rows=kind, iters=iters
        )
    if not (model or base.source):
        raise ConfigError(
            "The base has no folder; save it with a.base.save(path) and give model=path."
        )
    start = (
        str(trainer.path.resolve() / "start") if adapter.trained and not trainer.events else None
    )
    if start:  # the run would go on from there
        adapter.save(start)
    facts = mlx_call(
        keep, trainer.path, base, lora, config, trainer.rows, trainer.held, trainer.prompts
    )
    facts = replace(facts, source=model, plan=None) if model else facts
    return run_file.write(
        run_file.RunFile(facts, str(trainer.path.resolve()), seed=adapter.seed, start=start)
    )
