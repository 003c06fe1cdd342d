"""A run as a YAML file.

What a notebook's cells say, each section the arguments of one of them, for ``python -m qlab.run``.

Every key that is not known is refused; what is left out has its default. Knows no model and no
rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from qlab.core.config.legal import check_whole
from qlab.core.config.lora import LoRAConfig
from qlab.core.config.quant import QuantConfig, QuantPlan
from qlab.core.config.train import TrainConfig
from qlab.engine.train.run_folder import RunFacts
from qlab.errors import ConfigError, LoadError, nearest

_TOP = ("model", "quantize", "adapter", "train", "data", "val", "path", "prompts")
_STORAGE = tuple(f.name for f in fields(QuantConfig))
_ADAPTER = (*(f.name for f in fields(LoRAConfig)), "alpha", "seed")
_TRAIN = tuple(f.name for f in fields(TrainConfig))
_STOCK = ("fine_tune_type", "lora_parameters")  # words that only a recipe of mlx-lm has
_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")  # YAML 1.1 takes 1e-4 for a text


@dataclass(frozen=True)
class RunFile:
    """What the file says.

    Attributes:
        facts: model, storage, adapter, run and prompts; the base's fingerprint is not known yet.
        data: rows to train on: a file, or the folder of a run, whose rows are taken as they are.
        val: rows to judge by, as for ``Trainer``.
        path: folder to write; None is a new one.
        seed: of the adapter's start; None is the run's.
        start: folder of a saved adapter to go on from, instead of the adapter in ``facts``.
    """

    facts: RunFacts
    data: str
    val: str | int | float | None = None
    path: str | None = None
    seed: int | None = None
    start: str | None = None


def read(path: Path) -> RunFile:
    """Read a file.

    Raises:
        LoadError: it is missing, or no YAML; names the line.
        ConfigError: a key is unknown, missing or of the wrong kind, or its value is not legal;
            names the nearest legal one.
    """
    import yaml

    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _loader(yaml))
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(f"{path} cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        raise LoadError(f"{path} is no YAML: {error}.") from None
    try:
        return _run_file(found)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def write(file: RunFile) -> str:
    """Return the text that ``read`` reads as the same."""
    import yaml

    facts = file.facts
    adapter = {**asdict(facts.lora), **({} if file.seed is None else {"seed": file.seed})}
    said = {
        "model": facts.source,
        "quantize": facts.plan and _storage(facts.plan, facts.solver),
        "adapter": file.start or {**adapter, "keys": facts.lora.keys and list(facts.lora.keys)},
        "train": asdict(facts.train),
        "data": file.data,
        "val": file.val,
        "path": file.path,
        "prompts": list(facts.prompts) or None,
    }
    kept = {key: value for key, value in said.items() if value is not None}
    return _HEAD + yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)


_HEAD = """\
# Alone:              python -m qlab.run THIS_FILE
# Several processes:  mlx.launch -n 2 python -m qlab.run THIS_FILE   (they share every batch of batch_size rows)
"""


def _storage(plan: QuantPlan, solver: str) -> dict[str, Any]:
    own = {path: config and asdict(config) for path, config in plan.overrides.items()}
    return {**asdict(plan.default), "solver": solver, **({"overrides": own} if own else {})}


def _run_file(found: Any) -> RunFile:
    _mapping("the file", found)
    if stock := [key for key in _STOCK if key in found]:
        raise ConfigError(
            f"{stock[0]!r} is a word of mlx_lm.lora's recipes; t.to_yaml(), without data, writes the file for qlab.run."
        )
    _known("", found, _TOP)
    if missing := [key for key in ("model", "data") if not found.get(key)]:
        raise ConfigError(f"{' and '.join(missing)} must be given.")
    for key in ("model", "data", "path"):
        _kind(key, found.get(key), (str,), "a text")
    _kind(
        "val", found.get("val"), (str, int, float), "a file, a number of rows, or a share of them"
    )
    plan, solver = _plan(found.get("quantize"))
    lora, seed, start = _adapter(found.get("adapter"))
    train = TrainConfig(**_known("train", found.get("train"), _TRAIN))
    facts = RunFacts(found["model"], plan, solver, lora, train, "", _prompts(found.get("prompts")))
    return RunFile(facts, found["data"], found.get("val"), found.get("path"), seed, start)


def _plan(found: Any) -> tuple[QuantPlan | None, str]:
    if found is None:
        return None, "rtn"
    held = dict(_known("quantize", found, (*_STORAGE, "solver", "overrides")))
    solver = held.pop("solver", "rtn")
    own = held.pop("overrides", None)
    _kind("quantize.solver", solver, (str,), "a text")
    default = QuantConfig(**held)
    overrides = {}
    for path, storage in _mapping("quantize.overrides", {} if own is None else own).items():
        if (
            storage is not None
        ):  # what it does not say is as in the default, if the mode is the same
            said = _known(f"quantize.overrides.{path}", storage, _STORAGE)
            rest = asdict(default) if said.get("mode", default.mode) == default.mode else {}
            storage = QuantConfig(**{**rest, **said})
        overrides[str(path)] = storage
    return QuantPlan(default, overrides), solver


def _adapter(found: Any) -> tuple[LoRAConfig, int | None, str | None]:
    if isinstance(found, str):
        return LoRAConfig(), None, found
    held = dict(_known("adapter", found, _ADAPTER))
    seed = held.pop("seed", None)
    alpha = held.pop("alpha", None)
    if seed is not None:
        check_whole("adapter.seed", seed, 0)
    if alpha is not None and "scale" in held:
        raise ConfigError("adapter: alpha and scale say the same thing twice; give one of them.")
    lora = LoRAConfig(**held)
    return lora if alpha is None else lora.with_alpha(alpha), seed, None


def _prompts(found: Any) -> tuple[str, ...]:
    prompts = [found] if isinstance(found, str) else [] if found is None else found
    _kind("prompts", prompts, (list,), "a list of texts")
    for prompt in prompts:
        _kind("prompts", prompt, (str,), "a list of texts")
    return tuple(prompts)


def _known(section: str, found: Any, legal: Iterable[str]) -> Mapping[str, Any]:
    """Return a section's settings if all are known; an empty section has none."""
    held = _mapping(section, {} if found is None else found)
    unknown = [f"{key!r} is no setting.{nearest(key, legal)}" for key in held if key not in legal]
    if unknown:
        raise ConfigError(
            f"{section + ': ' if section else ''}{' '.join(unknown)} The settings are {', '.join(legal)}."
        )
    return held


def _mapping(name: str, found: Any) -> Mapping[str, Any]:
    if not isinstance(found, Mapping):
        raise ConfigError(
            f"{name} holds {found!r}; it is a list of settings, each a line 'name: value'."
        )
    return found


def _kind(name: str, value: Any, kinds: tuple[type, ...], what: str) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, kinds)):
        raise ConfigError(f"{name}={value!r} is not legal; it is {what}.")


def _loader(yaml: Any) -> Any:
    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[str] = set()
            for key, _ in node.value:
                name = str(key.value)
                if name in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{name!r} is there twice", key.start_mark
                    )
                seen.add(name)
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
    return Loader
