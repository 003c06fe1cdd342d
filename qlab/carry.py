"""Takes a run elsewhere: its folder, and its settings as a file for ``python -m qlab.run`` or for stock mlx-lm. Wiring only."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from qlab.core.rows import Rows
from qlab.core.training import LoRAConfig, TrainConfig
from qlab.engine import recipe, run_file, run_folder
from qlab.engine.job import mlx_call
from qlab.errors import ConfigError
from qlab.model import Model


def keep(
    path: Path, base: Model, lora: LoRAConfig, config: TrainConfig, rows: Rows, held: Rows | None, prompts: tuple[str, ...]
) -> run_folder.RunFacts:
    """Write what a run is made of to its folder, and return it. Runs on the MLX thread.

    Raises:
        SaveError: the place cannot be written.
    """
    whole = run_folder.fingerprint(base.module)
    facts = run_folder.RunFacts(base.source, base.plan, base.solver, lora, config, whole, prompts)
    run_folder.write(path, facts, rows, held)
    return facts


def to_yaml(trainer: Any, data: str | None, model: str | None) -> str:
    """See ``Trainer.to_yaml``."""
    adapter, base, lora, config = trainer.adapter, trainer.adapter.base, trainer.adapter.config, trainer.config
    if data is not None:
        if model is None and base.plan is not None:
            raise ConfigError("The base was quantized here; save it with a.base.save(path) and give model=path.")
        kind, iters = trainer.rows.kind, trainer.report.iters
        return recipe.to_yaml(model or base.source, base.spec, lora, config, data, rows=kind, iters=iters)
    if not (model or base.source):
        raise ConfigError("The base has no folder; save it with a.base.save(path) and give model=path.")
    start = str(trainer.path.resolve() / "start") if adapter.trained and not trainer.events else None
    if start:  # the run would go on from there
        adapter.save(start)
    facts = mlx_call(keep, trainer.path, base, lora, config, trainer.rows, trainer.held, trainer.prompts)
    facts = replace(facts, source=model, plan=None) if model else facts
    return run_file.write(run_file.RunFile(facts, str(trainer.path.resolve()), seed=adapter.seed, start=start))
