"""The folder of a run: what it was made of, so that it can be made again in another process.

``run.json`` names the model, its storage and the two configs; ``rows.npz`` holds the tokens that the run is trained on, so
that a resumed run sees the same rows whatever became of the data. Knows no step.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from qlab.core.config import QuantConfig, QuantPlan
from qlab.core.rows import Row, Rows
from qlab.core.training import LoRAConfig, TrainConfig
from qlab.errors import LoadError, SaveError

_PROBED = 64  # numbers of each array that go into a model's fingerprint


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


def fingerprint(module: nn.Module) -> str:
    """Return a hash of every array's name, shape, dtype and first numbers. Runs on the MLX thread."""
    digest = sha256()
    heads = [(path, a, a.reshape(-1)[:_PROBED].astype(mx.float32)) for path, a in sorted(tree_flatten(module.parameters()))]
    mx.eval([head for _, _, head in heads])
    for path, array, head in heads:
        digest.update(f"{path} {array.shape} {array.dtype}".encode())
        digest.update(np.array(head).tobytes())
    return digest.hexdigest()


def write(folder: Path, facts: RunFacts, rows: Rows, held: Rows | None) -> None:
    """Write the folder's two files.

    Raises:
        SaveError: the place cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        parts = [(name, part) for name, part in (("rows", rows), ("held", held)) if part]
        stored = {f"{name}_{key}": value for name, part in parts for key, value in _packed(part)}
        with (folder / ".rows.npz").open("wb") as file:
            np.savez(file, **stored)
        os.replace(folder / ".rows.npz", folder / "rows.npz")
        (folder / ".run.json").write_text(json.dumps(_plain(facts), indent=1))
        os.replace(folder / ".run.json", folder / "run.json")
    except OSError as error:
        raise SaveError(f"{folder} cannot be written ({error}); give the run another path.") from error


def read(folder: Path) -> tuple[RunFacts, Rows, Rows | None]:
    """Read the folder's two files.

    Raises:
        LoadError: one is missing or broken, or was written by a newer qlab.
    """
    try:
        facts = _facts(json.loads((folder / "run.json").read_text()))
        with np.load(folder / "rows.npz") as stored:
            parts = [_unpacked(stored, name) if f"{name}_tokens" in stored else None for name in ("rows", "held")]
    except FileNotFoundError as error:
        raise LoadError(f"{folder} is not the folder of a run: it has no {Path(error.filename).name}.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
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
    return {**facts.__dict__, "plan": storage, "lora": asdict(facts.lora), "train": asdict(facts.train)}


def _facts(found: dict[str, Any]) -> RunFacts:
    plan = found["plan"] and QuantPlan(
        QuantConfig(**found["plan"]["default"]),
        {path: config and QuantConfig(**config) for path, config in found["plan"]["overrides"].items()},
    )
    lora, train = LoRAConfig(**found["lora"]), TrainConfig(**found["train"])
    return RunFacts(**{**found, "plan": plan, "lora": lora, "train": train, "prompts": tuple(found["prompts"])})


def _packed(rows: Rows) -> list[tuple[str, np.ndarray]]:
    return [
        ("tokens", np.concatenate([row.tokens for row in rows])),
        ("mask", np.concatenate([row.mask for row in rows])),
        ("lengths", np.array([row.tokens.size for row in rows], np.int64)),
        ("numbers", np.array([row.number for row in rows], np.int64)),
        ("kind", np.array(rows.kind)),
    ]


def _unpacked(stored: Any, name: str) -> Rows:
    ends = np.cumsum(stored[f"{name}_lengths"])[:-1]
    parts = zip(
        stored[f"{name}_numbers"].tolist(), np.split(stored[f"{name}_tokens"], ends), np.split(stored[f"{name}_mask"], ends),
        strict=True,
    )  # fmt: skip
    return Rows(tuple(Row(*part) for part in parts), str(stored[f"{name}_kind"]))


def free(path: Path) -> Path:
    """Return a path that does not exist yet."""
    return path if not path.exists() else next(p for n in range(2, 10**6) if not (p := Path(f"{path}-{n}")).exists())
