"""What of a run is written while it trains: checkpoints, and the best adapter so far.

The loop calls these after a step. A disk that is full is reported on the time line and ends no run,
since its weights are in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from qlab.core.train.events import Mark
from qlab.engine.train.checkpoint import TrainState
from qlab.engine.train.task import Task
from qlab.errors import SaveError


def save_checkpoint(task: Task, state: TrainState) -> int:
    """Write a checkpoint to continue from; return its step."""
    checkpoints = task.checkpoints
    if checkpoints:
        stored = replace(state, optimizer=task.update.state_by_path(state.optimizer))
        if _write(task, lambda: checkpoints.save(stored)):
            task.marks.append(Mark("checkpoint", "checkpoint"))
    task.on_good(state)
    return state.step


def judge_validation(task: Task, state: TrainState, val_loss: float) -> str:
    """Write the adapter if it is the best so far; return why the run should stop early, if so."""
    if val_loss < state.best_val_loss:
        _take_best(task, state, val_loss)
        return ""
    state.stale += 1
    patience = task.config.early_stop
    if not patience or state.stale < patience:
        return ""
    text = (
        f"no better validation loss for {state.stale} validations; "
        f"the best was at step {state.best_step}"
    )
    task.marks.append(Mark("early_stop", text))
    return f"Stopped early: {text}."


def _take_best(task: Task, state: TrainState, val_loss: float) -> None:
    state.best_val_loss = val_loss
    state.best_step = state.step
    state.stale = 0
    task.marks.append(Mark("best", f"best so far: validation loss {val_loss:.4g}"))
    checkpoints = task.checkpoints
    if checkpoints:
        _write(task, lambda: checkpoints.save_best(state))


def _write(task: Task, write: Callable[[], Any]) -> bool:
    """Write; return whether it worked, and mark the time line if it did not."""
    try:
        write()
    except SaveError as error:
        task.marks.append(Mark("checkpoint", f"not written: {error}"))
        return False
    return True
