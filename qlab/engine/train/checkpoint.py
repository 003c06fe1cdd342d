"""What a training run needs to go on, on disk.

Written whole or not at all, so that the last one always opens.

A checkpoint is a folder that stock mlx-lm opens as an adapter; beside the adapter lie the
optimizer's state and the run's. Everything else that a step depends on (rows, dropout, learning
rate) follows from the config and the step's number.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from math import inf
from pathlib import Path
from typing import Any, Literal, cast

import mlx.core as mx

from qlab.core.train.events import Mark, StepEvent
from qlab.engine.io.loaded import check_safetensors
from qlab.engine.step.protocol import Arrays
from qlab.errors import LoadError
from qlab.runtime.atomic import write_folder

Kind = Literal["step", "best"]

_ADAPTER = "adapters.safetensors"
_KEPT = 2  # of the checkpoints to go on from; the best one is kept besides


@dataclass(kw_only=True)
class TrainState:
    """Where a run stands.

    Attributes:
        parameters: trainable arrays by path.
        optimizer: its arrays by path.
        learning_rate: base rate in force.
        step: optimizer steps done.
        seconds: spent in steps.
        tokens: that passed the model, padding not counted.
        best_val_loss: lowest validation loss so far.
        best_step: where it was.
        stale: validations since then.
        skipped: steps left out in a row, because they were no numbers.
        history: every event so far.
    """

    parameters: Arrays
    optimizer: Arrays
    learning_rate: float
    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    best_val_loss: float = inf
    best_step: int = 0
    stale: int = 0
    skipped: int = 0
    history: list[StepEvent] = field(default_factory=list)


def read_parameters(path: Path) -> Arrays:
    """Read the trainable arrays of a checkpoint, evaluated.

    Raises:
        LoadError: the file is missing or cut short.
    """
    file = path / _ADAPTER
    if not file.is_file():
        raise LoadError(f"{path} has no {_ADAPTER}.")
    check_safetensors(file)
    parameters = cast(Arrays, mx.load(str(file)))
    mx.eval(parameters)
    return parameters


_PLAIN = [
    f.name for f in fields(TrainState) if f.name not in ("parameters", "optimizer", "history")
]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: of the run; made at the first checkpoint.
        write_adapter: writes an adapter folder from trainable arrays by path.
    """

    def __init__(self, folder: Path, write_adapter: Callable[[Path, Arrays], Any]) -> None:
        self.folder = folder
        self._write_adapter = write_adapter

    def save(self, state: TrainState) -> Path:
        """Write a checkpoint to go on from; of older ones the last is kept.

        Raises:
            SaveError: the disk is full or the place cannot be written; what stood there is
                untouched.
        """
        return self._write("step", state, whole=True, kept=_KEPT)

    def save_best(self, state: TrainState) -> Path:
        """Write the adapter with the best validation loss; the one before is removed.

        Raises:
            SaveError: as above.
        """
        return self._write("best", state, whole=False, kept=1)

    def _write(self, kind: Kind, state: TrainState, whole: bool, kept: int) -> Path:
        final = self.folder / f"{kind}-{state.step:06d}"

        def fill(folder: Path) -> None:
            self._write_adapter(folder, state.parameters)
            if whole:
                mx.save_safetensors(str(folder / "optimizer.safetensors"), state.optimizer)
                (folder / "state.json").write_text(json.dumps(_facts(state)))

        # a resumed run writes the same step anew
        write_folder(final, fill, replaceable=["*"] if _is_ours(final) else [])
        folders = folders_of(self.folder, kind)
        # later ones are of a course that was left when the run was resumed here
        end = folders.index(final) + 1
        for old in [*folders[: max(end - kept, 0)], *folders[end:]]:
            if _is_ours(old):
                shutil.rmtree(old, ignore_errors=True)
        return final


def _is_ours(folder: Path) -> bool:
    """Whether a folder with a checkpoint's name is one; else it is the user's."""
    return (folder / _ADAPTER).is_file()


def folders_of(folder: Path, kind: Kind) -> list[Path]:
    """Return the folders in a run's folder that have a checkpoint's name, by ascending step.

    A name of the user's, such as ``step-000004-good``, is none, nor is a link.

    Args:
        folder: of the run.
        kind: ``step`` to go on from, ``best`` for the best adapter.
    """
    name = re.compile(rf"{kind}-[0-9]{{6,}}")
    folders = [
        path
        for path in folder.glob(f"{kind}-*")
        if name.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
    ]
    return sorted(folders, key=step_of)


def _facts(state: TrainState) -> dict[str, Any]:
    return {
        **{name: getattr(state, name) for name in _PLAIN},
        "history": [asdict(event) for event in state.history],
    }


def latest(folder: Path) -> Path:
    """Return the newest checkpoint of a run that opens.

    Args:
        folder: of the run, or of one of its checkpoints.

    Raises:
        LoadError: there is none.
    """
    if (folder / "state.json").is_file():
        _read(folder)
        return folder
    if not folder.exists():
        raise LoadError(f"{folder} does not exist; give the folder of a run.")
    folders = folders_of(folder, "step")
    for path in reversed(folders):
        try:
            _read(path)
            return path
        except LoadError:
            continue  # cut short by something other than us; an older one will do
    raise LoadError(
        f"{folder} holds no checkpoint that opens"
        + (f" ({len(folders)} are broken)." if folders else ".")
    )


def best(folder: Path) -> Path:
    """Return the adapter with the best validation loss of a run.

    Raises:
        LoadError: there is none.
    """
    folders = folders_of(folder, "best")
    if not folders:
        raise LoadError(f"{folder} holds no best adapter: no validation was made.")
    return folders[-1]


def step_of(folder: Path) -> int:
    """Return the optimizer steps behind a checkpoint or a best adapter, from its folder's name."""
    return int(folder.name.rpartition("-")[2])


def load(path: Path, parameters: Arrays) -> TrainState:
    """Read a checkpoint.

    Args:
        path: of its folder.
        parameters: of the adapter that it was made of, read from the same folder.

    Raises:
        LoadError: a file is missing or cut short, or the optimizer's state is not that of these
            parameters.
    """
    facts, optimizer = _read(path)
    state = TrainState(parameters=parameters, optimizer=optimizer, **facts)
    mx.eval(state.parameters, state.optimizer)
    return state


def _read(path: Path) -> tuple[dict[str, Any], Arrays]:
    for name in (_ADAPTER, "optimizer.safetensors"):
        if not (path / name).is_file():
            raise LoadError(f"{path} has no {name}, so it is not a whole checkpoint.")
        check_safetensors(path / name)
    try:
        stored = json.loads((path / "state.json").read_text())
        if missing := [name for name in [*_PLAIN, "history"] if name not in stored]:
            raise ValueError(f"it lacks {', '.join(missing)}")
        marked = [
            {**event, "marks": tuple(Mark(**mark) for mark in event["marks"])}
            for event in stored["history"]
        ]
        facts = {
            **{name: stored[name] for name in _PLAIN},
            "history": [StepEvent(**event) for event in marked],
        }
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LoadError(f"{path / 'state.json'} cannot be read: {error}.") from error
    return facts, cast(Arrays, mx.load(str(path / "optimizer.safetensors")))
