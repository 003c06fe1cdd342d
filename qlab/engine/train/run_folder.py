"""The folder of a run: what it was made of, so that it can be made again in another process.

``run.json`` names the model, its storage and the two configs; ``rows.npz`` holds the tokens that
the run is trained on, so that a resumed run sees the same rows whatever became of the data. Knows
no step.
"""

from __future__ import annotations

import json
import time
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
from qlab.errors import BusyError, ConfigError, LoadError, SaveError
from qlab.runtime.atomic import write_file

_NONE = np.zeros(0, np.int32)
_NAMED: set[Path] = set()  # in this kernel


@dataclass(frozen=True)
class RunFacts:
    """What a run is made of.

    Attributes:
        source: what ``qlab.load`` was given.
        plan: how the base was quantized in the kernel, or None.
        solver: by which codes were chosen.
        lora: the adapter.
        train: the run.
        base: fingerprint of the base.
        prompts: asked at every validation.
    """

    source: str
    plan: QuantPlan | None
    solver: str
    lora: LoRAConfig
    train: TrainConfig
    base: str
    prompts: tuple[str, ...] = ()


def write(folder: Path, facts: RunFacts, rows: Rows, held: Rows | None) -> None:
    """Write the folder's two files.

    Raises:
        SaveError: the place cannot be written.
    """
    try:
        parts = [(name, part) for name, part in (("rows", rows), ("held", held)) if part]
        stored = {f"{name}_{key}": value for name, part in parts for key, value in _packed(part)}
        write_file(folder / "rows.npz", lambda new: np.savez(new, **stored))
        # last, since a folder with a run.json counts as a run
        text = json.dumps(_plain(facts), indent=1)
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
            parts = [
                _unpacked(stored, name) if f"{name}_tokens" in stored else None
                for name in ("rows", "held")
            ]
    except FileNotFoundError as error:
        raise LoadError(
            f"{folder} is not the folder of a run: it has no {Path(error.filename).name}."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
        raise LoadError(f"The run in {folder} cannot be read: {error}.") from error
    if parts[0] is None:
        raise LoadError(f"{folder / 'rows.npz'} holds no rows.")
    return facts, parts[0], parts[1]


def _plain(facts: RunFacts) -> dict[str, Any]:
    plan = facts.plan
    storage = plan and {
        "default": asdict(plan.default),
        "overrides": {path: config and asdict(config) for path, config in plan.overrides.items()},
    }
    return {
        **facts.__dict__,
        "plan": storage,
        "lora": asdict(facts.lora),
        "train": asdict(facts.train),
    }


def _facts(found: dict[str, Any]) -> RunFacts:
    plan = found["plan"] and QuantPlan(
        QuantConfig(**found["plan"]["default"]),
        {
            path: config and QuantConfig(**config)
            for path, config in found["plan"]["overrides"].items()
        },
    )
    lora = LoRAConfig(**found["lora"])
    train = TrainConfig(**found["train"])
    return RunFacts(
        **{**found, "plan": plan, "lora": lora, "train": train, "prompts": tuple(found["prompts"])}
    )


def _packed(rows: Rows) -> list[tuple[str, np.ndarray]]:
    beyond = [_NONE if row.beyond is None else row.beyond for row in rows]
    return [
        ("tokens", np.concatenate([row.tokens for row in rows])),
        ("mask", np.concatenate([row.mask for row in rows])),
        ("lengths", np.array([row.tokens.size for row in rows], np.int64)),
        ("numbers", np.array([row.number for row in rows], np.int64)),
        ("cut", np.array([row.cut for row in rows], np.int64)),
        ("beyond", np.concatenate(beyond)),
        ("beyond_lengths", np.array([part.size for part in beyond], np.int64)),
        ("kind", np.array(rows.kind)),
        ("dropped", np.array(json.dumps(rows.dropped))),
    ]


def _unpacked(stored: Any, name: str) -> Rows:
    def parts(key: str, lengths: str) -> list[np.ndarray]:
        return np.split(stored[f"{name}_{key}"], np.cumsum(stored[f"{name}_{lengths}"])[:-1])

    numbers = stored[f"{name}_numbers"].tolist()
    cut = stored[f"{name}_cut"].tolist()
    beyond = [part if part.size else None for part in parts("beyond", "beyond_lengths")]
    made = zip(
        numbers, parts("tokens", "lengths"), parts("mask", "lengths"), cut, beyond, strict=True
    )
    dropped = tuple((number, why) for number, why in json.loads(str(stored[f"{name}_dropped"])))
    return Rows(tuple(Row(*part) for part in made), str(stored[f"{name}_kind"]), dropped)


def free(path: str | Path) -> Path:
    """Return a path that holds no run yet.

    This one, or the first with a number at its end that does not.

    Raises:
        ConfigError: it is no path.
    """
    if not isinstance(path, (str, Path)):
        raise ConfigError(f"path={path!r} is not legal; it is the path of a folder.")
    whole = Path(path).expanduser()
    numbered = (Path(f"{whole}-{n}") if n > 1 else whole for n in count(1))
    return next(path for path in numbered if not _taken(path))


def named(model: str) -> Path:
    """Return the path of a new folder that says which model it is and when; no two are the same."""
    name = f"{model.split('/')[-1]}-{time.strftime('%Y%m%d-%H%M%S')}"
    numbered = (Path("runs") / (f"{name}-{n}" if n > 1 else name) for n in count(1))
    path = next(path for path in numbered if path not in _NAMED and not _taken(path))
    _NAMED.add(path)
    return path


def check_new(path: Path) -> None:
    """Refuse a folder that has come to hold the checkpoints of another run.

    Raises:
        BusyError: it has.
    """
    if _begun(path):
        raise BusyError(f"{path} holds the checkpoints of another run by now; make a new Trainer.")


def _taken(path: Path) -> bool:
    return (path / "run.json").exists() or _begun(path)


def _begun(path: Path) -> bool:
    return any(path.glob("step-*")) or any(path.glob("best-*"))
