"""Prepares a run: splits the rows, attaches the adapter to the frozen base, chooses the step.

``Trainer`` and ``qlab.run`` call ``prepare_run`` on the MLX thread and hand its result to the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import ceil, prod
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from qlab.core.config.train import TrainConfig
from qlab.core.train.rows import Batch, Rows
from qlab.engine.adapt.attach import attach
from qlab.engine.adapt.files import save_adapter
from qlab.engine.data.batches import Feed
from qlab.engine.step.choose import make_step
from qlab.engine.step.product_trial import choose_compute
from qlab.engine.step.protocol import Arrays
from qlab.engine.train.checkpoint import Checkpoints, TrainState, load
from qlab.engine.train.inputs import RunInputs
from qlab.engine.train.task import Task
from qlab.engine.train.update import Update
from qlab.errors import ConfigError
from qlab.runtime.limits import Guard

_HELD_OUT_SHARE = 0.05  # of the rows, unless a user says otherwise
_MOST_HELD_OUT = 100
_FEWEST_TO_SPLIT = 20  # of fewer rows none are held out


class PreparedRun(NamedTuple):
    """A run that is ready to train.

    Attributes:
        task: what the loop steps.
        state: where the run stands.
        notes: how it is computed and why, one sentence each.
    """

    task: Task
    state: TrainState
    notes: tuple[str, ...]


def split_held_out(rows: Rows, wanted: float | None, seed: int) -> tuple[Rows, Rows | None]:
    """Split rows into those to train on and those held out for validation.

    Args:
        rows: all rows.
        wanted: how many to hold out: a number, or a share below 1; None is 5 %, at most 100 rows,
            and none of fewer than 20; 0 is none.
        seed: seed of the choice.

    Raises:
        DataError: so many cannot be held out.
    """
    if wanted is None:
        enough = len(rows) >= _FEWEST_TO_SPLIT
        wanted = min(round(_HELD_OUT_SHARE * len(rows)), _MOST_HELD_OUT) if enough else 0
    return rows.split(wanted, seed) if wanted else (rows, None)


def describe(feed: Feed, held_out: Rows | None) -> str:
    """Say in one line what there is to train on."""
    rows = feed.rows
    shape_count = len(feed.shapes)
    parts = [f"{len(rows)} {rows.kind} rows"]
    if held_out:
        parts.append(f"{len(held_out)} held out")
    if rows.dropped:
        parts.append(f"{len(rows.dropped)} dropped")
    if rows.cut:
        parts.append(f"{rows.cut} cut")
    if rows.duplicates:
        parts.append(f"{rows.duplicates} duplicate{_plural(rows.duplicates)}")
    parts.append(f"{rows.targets} targets")
    parts.append(f"{shape_count} shape{_plural(shape_count)}")
    parts.append(f"{100 * (feed.waste - 1):.0f} % padding")
    return ", ".join(parts)


def _plural(count: int) -> str:
    return "" if count == 1 else "s"


def with_largest_batch(config: TrainConfig, feed: Feed, size: int = 1) -> TrainConfig:
    """Return a config whose batch is the largest that one process will see, for an estimate.

    Args:
        config: config of the run.
        feed: batches of the run.
        size: number of processes that share each batch.
    """
    shapes = [(ceil(rows / size), length) for rows, length in feed.shapes]
    rows, length = max(shapes, key=prod)
    return replace(config, batch_size=rows, max_seq_length=max(length, 2))


def check_shared(config: TrainConfig, size: int) -> None:
    """Refuse a batch that several processes cannot share evenly.

    Raises:
        ConfigError: names the nearest batch sizes that they can.
    """
    missing = -config.batch_size % size
    if not missing:
        return
    larger = config.batch_size + missing
    smaller = larger - size
    nearest = f"{smaller} or {larger}" if smaller else f"{larger}"
    raise ConfigError(
        f"batch_size={config.batch_size} is not legal for {size} processes, which share every "
        f"batch evenly; the nearest is {nearest}."
    )


def validation_batches(held_out: Rows | None, config: TrainConfig) -> tuple[Batch, ...]:
    """Return the batches of every validation: the same ones each time, never packed."""
    if held_out is None or not len(held_out):
        return ()
    feed = Feed(held_out, replace(config, pack=False))
    count = feed.per_epoch
    if config.val_batches >= 0:
        count = min(config.val_batches, count)
    return tuple(feed.batch(i) for i in range(count))


def prepare_run(inputs: RunInputs, on_good: Callable[[TrainState], None]) -> PreparedRun:
    """Build the step, the optimizer and the state of a run. Runs on the MLX thread.

    Args:
        inputs: what the run is computed from.
        on_good: called with the state after every validation and checkpoint, and at the end.

    Returns:
        A run at its start, or at ``inputs.start_from``.

    Raises:
        ConfigError, LayerNotFoundError: the adapter does not fit the model, or the checkpoint's
            optimizer is not the run's.
        UnsupportedError: the model's step cannot be built as the config wants it.
        LoadError: the checkpoint cannot be read.
    """
    config = inputs.config
    tokens = with_largest_batch(config, inputs.feed, inputs.ranks.size).tokens
    compute, notes = choose_compute(inputs.module, inputs.spec, tokens)
    module = attach(inputs.module, inputs.spec, inputs.lora, compute, config.grad_checkpoint)
    step = make_step(module, config)
    # sums over arrays follow their order, and a file has another order than the step
    parameters = {path: inputs.parameters[path] for path in step.parameters}
    update = Update(config, parameters)
    task = Task(
        step=step,
        update=update,
        feed=inputs.feed,
        held_out=validation_batches(inputs.held_out, config),
        config=config,
        guard=Guard(inputs.limit_nbytes),
        checkpoints=_checkpoints(inputs),
        on_good=on_good,
        ranks=inputs.ranks,
    )
    if inputs.start_from is None:
        parameters = update.by_path(update.flat(parameters))
        state = TrainState(
            parameters=parameters, optimizer=update.state, learning_rate=config.learning_rate
        )
        mx.eval(state.parameters, state.optimizer)
    else:
        state = resumed(inputs.start_from, parameters, update)
    return PreparedRun(task, state, (*step.notes, *notes))


def _checkpoints(inputs: RunInputs) -> Checkpoints | None:
    """Return where checkpoints are written; only the first of several processes writes."""
    if inputs.folder is None or not inputs.ranks.first:
        return None

    def write_adapter(folder: Path, arrays: Arrays) -> None:
        save_adapter(folder, arrays, inputs.lora, inputs.spec, inputs.source)

    return Checkpoints(inputs.folder, write_adapter)


def resumed(path: Path, parameters: Arrays, update: Update) -> TrainState:
    """Return the state of a checkpoint, if it belongs to this run. Runs on the MLX thread.

    Args:
        path: folder of the checkpoint.
        parameters: trainable arrays of the checkpoint by path.
        update: the run's optimizer.

    Raises:
        LoadError: it cannot be read.
        ConfigError: its optimizer is not the run's.
    """
    state = load(path, parameters)
    _check_same_optimizer(path, state.optimizer, update.state_by_path(update.state))
    state.parameters = update.by_path(update.flat(state.parameters))
    state.optimizer = update.state_from_paths(state.optimizer)
    mx.eval(state.parameters, state.optimizer)
    return state


def _check_same_optimizer(path: Path, stored: Arrays, wanted: Arrays) -> None:
    for name in sorted(stored.keys() | wanted.keys()):
        one = stored.get(name)
        other = wanted.get(name)
        missing = one is None or other is None
        if missing or one.shape != other.shape or one.dtype != other.dtype:
            raise ConfigError(
                f"The optimizer's state in {path} is not that of this run: {name!r} differs."
            )
