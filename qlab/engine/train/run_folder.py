"""The folder of a run: its settings and rows, so that another process can continue it.

``run.json`` names the model, its storage and the two configs; ``rows.npz`` holds the tokens that
the run is trained on, so that a resumed run sees the same rows whatever became of the data.
``Trainer`` and ``qlab.run`` write it when a run starts, and read it when a run is loaded.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from qlab.core.config.lora import LoRAConfig
from qlab.core.config.quant import QuantConfig, QuantPlan
from qlab.core.config.train import TrainConfig
from qlab.core.train.rows import Row, Rows
from qlab.engine.train.checkpoint import folders_of
from qlab.errors import BusyError, ConfigError, LoadError, SaveError
from qlab.runtime.atomic import write_file
from qlab.runtime.paths import users_path

_NO_TOKENS = np.zeros(0, np.int32)
_new_paths: set[Path] = set()  # chosen in this kernel, though nothing may lie there yet


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """All settings of a run, as its folder stores them.

    Attributes:
        source: what ``qlab.load`` was given.
        plan: how the base was quantized in the kernel, or None.
        solver: name of the solver that chose the codes.
        lora: config of the adapter.
        train: config of the run.
        base: fingerprint of the base's arrays.
        prompts: asked at every validation.
    """

    source: str
    plan: QuantPlan | None
    solver: str
    lora: LoRAConfig
    train: TrainConfig
    base: str
    prompts: tuple[str, ...] = ()


def write(folder: Path, facts: RunFacts, rows: Rows, held_out: Rows | None) -> None:
    """Write the folder's two files, ``run.json`` and ``rows.npz``.

    Raises:
        SaveError: the place cannot be written.
    """
    arrays = {**_stored("rows", rows), **_stored("held", held_out)}
    text = json.dumps(_json(facts), indent=1)
    try:
        # (numpy's stub takes each array for its argument allow_pickle)
        write_file(folder / "rows.npz", lambda new: np.savez(new, **arrays))  # type: ignore
        # last, since a folder with a run.json counts as a run
        write_file(folder / "run.json", lambda new: new.write_text(text))
    except SaveError as error:
        reason = error.__cause__ or error
        message = f"{folder} cannot be written ({reason}); give the run another path."
        raise SaveError(message) from error


def read(folder: Path) -> tuple[RunFacts, Rows, Rows | None]:
    """Read the folder's two files.

    Raises:
        LoadError: one is missing or broken, or was written by a newer qlab.
    """
    try:
        facts = _facts(json.loads((folder / "run.json").read_text()))
        with np.load(folder / "rows.npz") as stored:
            rows = _rows(stored, "rows")
            held_out = _rows(stored, "held")
    except FileNotFoundError as error:
        raise LoadError(
            f"{folder} is not the folder of a run: it has no {Path(error.filename).name}."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
        raise LoadError(f"The run in {folder} cannot be read: {error}.") from error
    if rows is None:
        raise LoadError(f"{folder / 'rows.npz'} holds no rows.")
    return facts, rows, held_out


def _json(facts: RunFacts) -> dict[str, Any]:
    return {
        "source": facts.source,
        "plan": facts.plan and _plan_json(facts.plan),
        "solver": facts.solver,
        "lora": asdict(facts.lora),
        "train": asdict(facts.train),
        "base": facts.base,
        "prompts": facts.prompts,
    }


def _plan_json(plan: QuantPlan) -> dict[str, Any]:
    overrides = {path: config and asdict(config) for path, config in plan.overrides.items()}
    return {"default": asdict(plan.default), "overrides": overrides}


def _facts(stored: dict[str, Any]) -> RunFacts:
    return RunFacts(
        **{
            **stored,
            "plan": stored["plan"] and _plan(stored["plan"]),
            "lora": LoRAConfig(**stored["lora"]),
            "train": TrainConfig(**stored["train"]),
            "prompts": tuple(stored["prompts"]),
        }
    )


def _plan(stored: dict[str, Any]) -> QuantPlan:
    overrides = {
        path: config and QuantConfig(**config) for path, config in stored["overrides"].items()
    }
    return QuantPlan(QuantConfig(**stored["default"]), overrides)


def _stored(name: str, rows: Rows | None) -> dict[str, np.ndarray]:
    """Return rows as arrays by ``<name>_<field>``, the rows' tokens one after the other."""
    if not rows:
        return {}
    beyond = [_NO_TOKENS if row.beyond is None else row.beyond for row in rows]
    arrays = {
        "tokens": np.concatenate([row.tokens for row in rows]),
        "mask": np.concatenate([row.mask for row in rows]),
        "lengths": np.array([row.tokens.size for row in rows], np.int64),
        "numbers": np.array([row.number for row in rows], np.int64),
        "cut": np.array([row.cut for row in rows], np.int64),
        "beyond": np.concatenate(beyond),
        "beyond_lengths": np.array([part.size for part in beyond], np.int64),
        "kind": np.array(rows.kind),
        "dropped": np.array(json.dumps(rows.dropped)),
    }
    return {f"{name}_{key}": array for key, array in arrays.items()}


def _rows(stored: Mapping[str, np.ndarray], name: str) -> Rows | None:
    """Return what ``_stored`` made of rows, or None if there were none."""
    if f"{name}_tokens" not in stored:
        return None

    def split(key: str, lengths: str) -> list[np.ndarray]:
        ends = np.cumsum(stored[f"{name}_{lengths}"])[:-1]
        return np.split(stored[f"{name}_{key}"], ends)

    columns = zip(
        stored[f"{name}_numbers"].tolist(),
        split("tokens", "lengths"),
        split("mask", "lengths"),
        stored[f"{name}_cut"].tolist(),
        [part if part.size else None for part in split("beyond", "beyond_lengths")],
        strict=True,
    )
    dropped = json.loads(str(stored[f"{name}_dropped"]))
    rows = tuple(
        Row(number=number, tokens=tokens, mask=mask, cut=cut, beyond=beyond)
        for number, tokens, mask, cut, beyond in columns
    )
    return Rows(
        rows,
        str(stored[f"{name}_kind"]),
        tuple((number, reason) for number, reason in dropped),
    )


def unused_path(path: str | Path) -> Path:
    """Return a path at which no run lies yet: this one, or the first with a number at its end.

    Example:
        >>> unused_path("runs/demo")  # runs/demo and runs/demo-2 hold runs
        PosixPath('runs/demo-3')

    Raises:
        ConfigError: it is no path.
    """
    if not isinstance(path, (str, Path)):
        raise ConfigError(f"path={path!r} is not legal; it is the path of a folder.")
    return next(path for path in _numbered(users_path(path, SaveError)) if not _holds_run(path))


def new_run_path(model: str) -> Path:
    """Return the path of a new folder named for the model and the time; no two are the same.

    Args:
        model: name of the model, such as ``mlx-community/Qwen3-0.6B-bf16``.
    """
    name = f"{model.split('/')[-1]}-{time.strftime('%Y%m%d-%H%M%S')}"
    for path in _numbered(Path("runs") / name):
        if path not in _new_paths and not _holds_run(path):
            _new_paths.add(path)
            return path
    raise AssertionError("there is always a next number")


def _numbered(path: Path) -> Iterator[Path]:
    """Yield ``path``, ``path-2``, ``path-3`` and so on."""
    yield path
    for n in count(2):
        yield Path(f"{path}-{n}")


def check_new(path: Path) -> None:
    """Refuse a folder that has come to hold the checkpoints of another run.

    Raises:
        BusyError: it has.
    """
    if _has_checkpoints(path):
        raise BusyError(f"{path} holds the checkpoints of another run by now; make a new Trainer.")


def _holds_run(path: Path) -> bool:
    return (path / "run.json").exists() or _has_checkpoints(path)


def _has_checkpoints(path: Path) -> bool:
    return bool(folders_of(path, "step") or folders_of(path, "best"))
