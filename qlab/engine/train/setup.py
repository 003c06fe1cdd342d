"""Makes a run ready: the frozen base and its adapter as something to step, and the batches.

Knows no files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import ceil, prod
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from qlab.core.config.lora import LoRAConfig
from qlab.core.config.spec import ModelSpec
from qlab.core.config.train import TrainConfig
from qlab.core.train.rows import Batch, Rows
from qlab.engine.adapt.attach import attach
from qlab.engine.data.batches import Feed
from qlab.engine.step.choose import make_step
from qlab.engine.step.product_trial import choose_compute
from qlab.engine.step.protocol import Arrays
from qlab.engine.train.checkpoint import Checkpoints, TrainState, load
from qlab.engine.train.distributed import ALONE, Ranks
from qlab.engine.train.loop import Task
from qlab.engine.train.update import Update
from qlab.errors import ConfigError
from qlab.runtime.limits import Guard

_SHARE = 0.05  # of the rows, held out unless told
_MOST_HELD = 100
_FEW = 20  # rows below which none are held out


def held_out(rows: Rows, wanted: float | None, seed: int) -> tuple[Rows, Rows | None]:
    """Split rows into those to train on and those to judge by.

    Args:
        rows: all.
        wanted: to hold out: a number, or a share below 1; None is 5 %, at most 100 rows, and none
            of fewer than 20; 0 is none.
        seed: of the choice.

    Raises:
        DataError: so many cannot be held out.
    """
    if wanted is None:
        wanted = min(round(_SHARE * len(rows)), _MOST_HELD) if len(rows) >= _FEW else 0
    return rows.split(wanted, seed) if wanted else (rows, None)


def describe(feed: Feed, held: Rows | None) -> str:
    """Say in a line what there is to train on."""
    rows = feed.rows
    shapes = len(feed.shapes)
    parts = [f"{len(rows)} {rows.kind} rows"]
    parts += [f"{len(held)} held out"] if held else []
    repeats = f"duplicate{'s' * (rows.duplicates != 1)}"
    found = ((len(rows.dropped), "dropped"), (rows.cut, "cut"), (rows.duplicates, repeats))
    parts += [f"{count} {what}" for count, what in found if count]
    parts += [
        f"{rows.targets} targets",
        f"{shapes} shape{'s' if shapes > 1 else ''}",
        f"{100 * (feed.waste - 1):.0f} % padding",
    ]
    return ", ".join(parts)


def largest(config: TrainConfig, feed: Feed, size: int = 1) -> TrainConfig:
    """Return the run with the largest batch that its rows make for one of ``size`` processes, for
    an estimate.
    """
    rows, length = max(((ceil(rows / size), length) for rows, length in feed.shapes), key=prod)
    return replace(config, batch_size=rows, max_seq_length=max(length, 2))


def check_shared(config: TrainConfig, size: int) -> None:
    """Refuse a batch that several processes cannot share evenly.

    Raises:
        ConfigError: names the nearest batch sizes that they can.
    """
    more = -config.batch_size % size
    if more:
        less = config.batch_size + more - size
        near = f"{less} or {less + size}" if less else f"{size}"
        raise ConfigError(
            f"batch_size={config.batch_size} is not legal for {size} processes, which share every batch evenly; "
            f"the nearest is {near}."
        )


def validation_batches(held: Rows | None, config: TrainConfig) -> tuple[Batch, ...]:
    """Return the batches of every validation: the same ones each time, never packed."""
    if held is None or not len(held):
        return ()
    feed = Feed(held, replace(config, pack=False))
    count = feed.per_epoch if config.val_batches < 0 else min(config.val_batches, feed.per_epoch)
    return tuple(feed.batch(i) for i in range(count))


def make_task(
    module: nn.Module,
    spec: ModelSpec,
    lora: LoRAConfig,
    config: TrainConfig,
    feed: Feed,
    held: tuple[Batch, ...],
    parameters: Arrays,
    checkpoints: Checkpoints | None,
    on_good: Callable[[TrainState], None],
    limit_nbytes: int | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Task, TrainState, tuple[str, ...]]:
    """Return a run, where it stands at first, and what to know about how it is computed.

    Runs on the MLX thread.

    Args:
        module: the base; it is not changed.
        spec: its layers.
        lora: the adapter.
        config: the run.
        feed: batches to train on.
        held: batches of a validation.
        parameters: the adapter's arrays by path, evaluated.
        checkpoints: where to write, or None; only the first of several processes writes.
        on_good: see ``Task``.
        limit_nbytes: of memory; None takes it from what is free.
        ranks: the processes that train together, with the same parameters.

    Raises:
        ConfigError, LayerNotFoundError: the adapter does not fit the model.
        UnsupportedError: the model's step cannot be built as the config wants it.
    """
    compute, notes = choose_compute(module, spec, largest(config, feed, ranks.size).tokens)
    step = make_step(attach(module, spec, lora, compute, config.grad_checkpoint), config)
    # sums over arrays follow their order, and a file has one of its own
    parameters = {path: parameters[path] for path in step.parameters}
    update = Update(config, parameters)
    parameters = update.by_path(update.kept(parameters))
    state = TrainState(parameters, update.state, config.learning_rate)
    mx.eval(state.parameters, state.optimizer)
    kept = checkpoints if ranks.first else None
    task = Task(step, update, feed, held, config, Guard(limit_nbytes), kept, on_good, ranks=ranks)
    return task, state, (*step.notes, *notes)


def resumed(path: Path, parameters: Arrays, task: Task) -> TrainState:
    """Return where a checkpoint stands, if it is one of this run. Runs on the MLX thread.

    Raises:
        LoadError: it cannot be read.
        ConfigError: its optimizer is not the run's.
    """
    state = load(path, parameters)
    wanted = task.update.state_by_path(task.update.state)
    for name in sorted(state.optimizer.keys() | wanted.keys()):
        found = state.optimizer.get(name)
        other = wanted.get(name)
        if (
            found is None
            or other is None
            or found.shape != other.shape
            or found.dtype != other.dtype
        ):
            raise ConfigError(
                f"The optimizer's state in {path} is not that of this run: {name!r} differs."
            )
    state.parameters = task.update.by_path(task.update.kept(state.parameters))
    state.optimizer = task.update.state_joined(state.optimizer)
    mx.eval(state.parameters, state.optimizer)
    return state
