"""A run as a YAML file: what a notebook's cells say, each section the arguments of one of them.

``Trainer.to_yaml`` writes it and ``python -m qlab.run`` reads it. A key that is not known is
refused; what is left out has its default.
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

_SECTIONS = ("model", "quantize", "adapter", "train", "data", "val", "path", "prompts")
_STORAGE = tuple(f.name for f in fields(QuantConfig))
_ADAPTER = (*(f.name for f in fields(LoRAConfig)), "alpha", "seed")
_TRAIN = tuple(f.name for f in fields(TrainConfig))
_STOCK = ("fine_tune_type", "lora_parameters")  # keys that only a recipe of mlx-lm has
_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")  # YAML 1.1 takes 1e-4 for a text
_HEAD = """\
# Alone:              python -m qlab.run THIS_FILE
# Several processes:  mlx.launch -n 2 python -m qlab.run THIS_FILE   (they share every batch of batch_size rows)
"""  # noqa: E501  # one line of the file that is written


@dataclass(frozen=True, kw_only=True)
class RunFile:
    """What the file says.

    Attributes:
        facts: model, storage, adapter, run and prompts; the base's fingerprint is not known yet.
        data: rows to train on: a file, or the folder of a run, whose rows are taken as they are.
        val: rows for validation, as for ``Trainer``.
        path: folder to write; None is a new one.
        seed: seed of the adapter's first values; None is the run's.
        start: folder of a saved adapter to start from, instead of the adapter in ``facts``.
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
        content = yaml.load(path.read_text(encoding="utf-8"), _loader(yaml))
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(f"{path} cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        raise LoadError(f"{path} is no YAML: {error}.") from None
    try:
        return _run_file(content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def write(file: RunFile) -> str:
    """Return the text that ``read`` reads as the same."""
    import yaml

    facts = file.facts
    sections = {
        "model": facts.source,
        "quantize": facts.plan and _storage_section(facts.plan, facts.solver),
        "adapter": file.start or _adapter_section(facts.lora, file.seed),
        "train": asdict(facts.train),
        "data": file.data,
        "val": file.val,
        "path": file.path,
        "prompts": list(facts.prompts) or None,
    }
    written = {key: value for key, value in sections.items() if value is not None}
    return _HEAD + yaml.safe_dump(written, sort_keys=False, allow_unicode=True)


def _storage_section(plan: QuantPlan, solver: str) -> dict[str, Any]:
    section = {**asdict(plan.default), "solver": solver}
    overrides = {path: config and asdict(config) for path, config in plan.overrides.items()}
    if overrides:
        section["overrides"] = overrides
    return section


def _adapter_section(lora: LoRAConfig, seed: int | None) -> dict[str, Any]:
    section = asdict(lora)
    if seed is not None:
        section["seed"] = seed
    section["keys"] = lora.keys and list(lora.keys)
    return section


def _run_file(content: Any) -> RunFile:
    sections = _mapping("the file", content)
    stock = [key for key in _STOCK if key in sections]
    if stock:
        raise ConfigError(
            f"{stock[0]!r} is a word of mlx_lm.lora's recipes; t.to_yaml(), without data, writes "
            "the file for qlab.run."
        )
    _known("", sections, _SECTIONS)
    missing = [key for key in ("model", "data") if not sections.get(key)]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} must be given.")
    for key in ("model", "data", "path"):
        _check_type(key, sections.get(key), (str,), "a text")
    val = sections.get("val")
    _check_type("val", val, (str, int, float), "a file, a number of rows, or a share of them")
    plan, solver = _plan(sections.get("quantize"))
    lora, seed, start = _adapter(sections.get("adapter"))
    facts = RunFacts(
        source=sections["model"],
        plan=plan,
        solver=solver,
        lora=lora,
        train=TrainConfig(**_known("train", sections.get("train"), _TRAIN)),
        base="",
        prompts=_prompts(sections.get("prompts")),
    )
    return RunFile(
        facts=facts,
        data=sections["data"],
        val=val,
        path=sections.get("path"),
        seed=seed,
        start=start,
    )


def _plan(section: Any) -> tuple[QuantPlan | None, str]:
    """Return the plan and the name of the solver."""
    if section is None:
        return None, "rtn"
    settings = dict(_known("quantize", section, (*_STORAGE, "solver", "overrides")))
    solver = settings.pop("solver", "rtn")
    overrides = settings.pop("overrides", None)
    _check_type("quantize.solver", solver, (str,), "a text")
    default = QuantConfig(**settings)
    by_path = _mapping("quantize.overrides", {} if overrides is None else overrides)
    configs = {str(path): _override(path, storage, default) for path, storage in by_path.items()}
    return QuantPlan(default, configs), solver


def _override(path: Any, storage: Any, default: QuantConfig) -> QuantConfig | None:
    """Return a layer's config; what it leaves out is as in the default, if the mode is the same."""
    if storage is None:
        return None
    settings = _known(f"quantize.overrides.{path}", storage, _STORAGE)
    same_mode = settings.get("mode", default.mode) == default.mode
    rest = asdict(default) if same_mode else {}
    return QuantConfig(**{**rest, **settings})


def _adapter(section: Any) -> tuple[LoRAConfig, int | None, str | None]:
    """Return the config, the seed, and the folder of a saved adapter to start from."""
    if isinstance(section, str):
        return LoRAConfig(), None, section
    settings = dict(_known("adapter", section, _ADAPTER))
    seed = settings.pop("seed", None)
    alpha = settings.pop("alpha", None)
    if seed is not None:
        check_whole("adapter.seed", seed, 0)
    if alpha is not None and "scale" in settings:
        raise ConfigError("adapter: alpha and scale say the same thing twice; give one of them.")
    lora = LoRAConfig(**settings)
    if alpha is not None:
        lora = lora.with_alpha(alpha)
    return lora, seed, None


def _prompts(section: Any) -> tuple[str, ...]:
    if section is None:
        return ()
    prompts = [section] if isinstance(section, str) else section
    _check_type("prompts", prompts, (list,), "a list of texts")
    for prompt in prompts:
        _check_type("prompts", prompt, (str,), "a list of texts")
    return tuple(prompts)


def _known(section: str, content: Any, legal: Iterable[str]) -> Mapping[str, Any]:
    """Return a section's settings if all are known; an empty section has none."""
    settings = _mapping(section, {} if content is None else content)
    unknown = [key for key in settings if key not in legal]
    if unknown:
        complaints = [f"{key!r} is no setting.{nearest(key, legal)}" for key in unknown]
        place = f"{section}: " if section else ""
        raise ConfigError(f"{place}{' '.join(complaints)} The settings are {', '.join(legal)}.")
    return settings


def _mapping(name: str, content: Any) -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        raise ConfigError(
            f"{name} holds {content!r}; it is a list of settings, each a line 'name: value'."
        )
    return content


def _check_type(name: str, value: Any, types: tuple[type, ...], what: str) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, types):
        raise ConfigError(f"{name}={value!r} is not legal; it is {what}.")


def _loader(yaml: Any) -> Any:
    """Return a YAML loader that refuses a key that is there twice and reads 1e-4 as a number."""

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
