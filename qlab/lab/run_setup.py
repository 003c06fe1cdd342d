"""Rows and settings of a run: read for training, and written for ``qlab.run`` and mlx-lm.

``Trainer`` and ``qlab.run`` call these; they connect the notebook's objects with ``engine/train``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from qlab.core.config.lora import LoRAConfig
from qlab.core.config.train import TrainConfig
from qlab.core.train.rows import Rows
from qlab.engine.data.tokenize import read
from qlab.engine.models.fingerprint import fingerprint
from qlab.engine.train import run_file
from qlab.engine.train.mlx_recipe import MlxRecipe, to_yaml
from qlab.engine.train.run_folder import RunFacts
from qlab.engine.train.setup import split_held_out
from qlab.errors import ConfigError
from qlab.lab.adapter import Adapter
from qlab.lab.model import Model


def read_rows(data: Any, adapter: Adapter, config: TrainConfig) -> Rows:
    """Turn data into token rows for an adapter's model.

    Raises:
        DataError: rows cannot be used; names each of them.
    """
    model = adapter.model
    return read(data, model.tokenizer, config, model.spec.vocabulary)


def train_and_held_out(
    data: Any, val: Any, adapter: Adapter, config: TrainConfig
) -> tuple[Rows, Rows | None]:
    """Return the rows to train on and those for validation.

    Args:
        data: as for ``Trainer``.
        val: as for ``Trainer``.
        adapter: adapter to train.
        config: config of the run.

    Raises:
        DataError: rows cannot be used, or so many cannot be held out.
    """
    rows = read_rows(data, adapter, config)
    if val is None or isinstance(val, (int, float)):
        return split_held_out(rows, val, config.seed)
    return rows, read_rows(val, adapter, config)


def run_facts(
    base: Model, lora: LoRAConfig, config: TrainConfig, prompts: tuple[str, ...]
) -> RunFacts:
    """Return what the folder of a run says about it. Runs on the MLX thread."""
    return RunFacts(
        source=base.source,
        plan=base.plan,
        solver=base.solver,
        lora=lora,
        train=config,
        base=fingerprint(base.module),
        prompts=prompts,
    )


def stock_recipe(
    adapter: Adapter,
    config: TrainConfig,
    *,
    data: str,
    model: str | None,
    rows: str,
    iters: int,
) -> str:
    """Return the text of a recipe for ``mlx_lm.lora --config``.

    Args:
        adapter: adapter to train.
        config: config of the run.
        data: folder with ``train.jsonl`` and ``valid.jsonl``.
        model: folder of the base; None is where it was loaded from.
        rows: kind of the rows.
        iters: optimizer steps in all.

    Raises:
        ConfigError: mlx-lm cannot do that, or the base was quantized here and has no folder.
    """
    base = adapter.base
    if model is None and base.plan is not None:
        raise ConfigError(
            "The base was quantized here; save it with a.base.save(path) and give model=path."
        )
    recipe = MlxRecipe(
        model=model or base.source,
        spec=base.spec,
        lora=adapter.config,
        train=config,
        data=data,
        rows=rows,
        iters=iters,
    )
    return to_yaml(recipe)


def check_has_folder(base: Model, model: str | None) -> None:
    """Refuse a base that another process could not load.

    Raises:
        ConfigError: says how to give it a folder.
    """
    if not (model or base.source):
        raise ConfigError(
            "The base has no folder; save it with a.base.save(path) and give model=path."
        )


def run_file_text(
    facts: RunFacts, folder: Path, *, seed: int, start: str | None, model: str | None
) -> str:
    """Return the text of a file for ``python -m qlab.run``.

    Args:
        facts: settings of the run.
        folder: folder of the run, which holds its rows.
        seed: seed of the adapter's first values.
        start: folder of a saved adapter to start from, or None.
        model: folder of the base as it is trained; None loads and quantizes it as in ``facts``.
    """
    if model:
        facts = replace(facts, source=model, plan=None)
    return run_file.write(run_file.RunFile(facts=facts, data=str(folder), seed=seed, start=start))
