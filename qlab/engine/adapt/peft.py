"""An adapter in PEFT's words and back: names, transposes, alpha for scale, targets by name.

Sources: PEFT 0.21 ``tuners/lora/config.py`` (options), ``tuners/lora/layer.py`` (forward, shapes)
and ``utils/save_and_load.py`` (names in the file). Touches no disk. Knows no base weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import sqrt
from typing import Any

import mlx.core as mx

from qlab import registry
from qlab.core.config.legal import is_number
from qlab.core.config.lora import LoRAConfig
from qlab.core.config.spec import LayerSpec, ModelSpec
from qlab.engine.adapt.targets import SettingError, shortest_keys
from qlab.errors import ConfigError, nearest

Arrays = dict[str, mx.array]
_PREFIX = "base_model.model."
_LINEAR = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b", "lora_magnitude_vector": "m"}
_EMBEDDING = {"lora_embedding_A": "lora_a", "lora_embedding_B": "lora_b"}
_NAMES = {**_LINEAR, **_EMBEDDING}
# modules of these are called the same by mlx-lm and transformers (tests/bench/peft_roundtrip.py)
SAME_NAMES = (
    "cohere",
    "cohere2",
    "ernie4_5",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "granite",
    "hunyuan_v1_dense",
    "lfm2",
    "llama",
    "mamba",
    "ministral3",
    "mistral",
    "olmo2",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
)
# options that say nothing about the numbers, or that are read below
_READ = {
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "init_lora_weights",
    "task_type",
    "inference_mode",
    "revision",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qlab",
}
_INITS = (
    True,
    False,
    None,
    "gaussian",
    "eva",
    "orthogonal",
)  # the others change the base's weights as well


def to_peft(
    arrays: Mapping[str, mx.array],
    lora: LoRAConfig,
    spec: ModelSpec,
    base_name: str,
    model_type: str | None,
) -> tuple[dict[str, Any], Arrays, str]:
    """Return PEFT's settings and arrays, and who can open them.

    Args:
        arrays: by path, as qlab has them.
        lora: what they are.
        spec: the base's layers.
        base_name: hub id or folder of the base.
        model_type: of the base's config.json, or None.

    Raises:
        ConfigError: PEFT has no such adapter.
    """
    targets = lora.targets(spec)
    _refuse(lora, targets)
    made: Arrays = {}
    for layer in targets:
        for theirs, ours in (_EMBEDDING if layer.kind == "embedding" else _LINEAR).items():
            if f"{layer.path}.{ours}" in arrays:
                made[f"{_PREFIX}{layer.path}.{theirs}"] = mx.contiguous(
                    arrays[f"{layer.path}.{ours}"].T
                )
    mx.eval(made)
    blocks = list(spec.blocks)
    taken = sorted({layer.block for layer in targets} - {None})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rslora,
        **(lora.adapter_kind.peft_settings() or {}),
        "lora_dropout": lora.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": [layer.path for layer in targets],
        "layers_to_transform": None,
    }
    for names in (
        [x.role.split(".")[-1] for x in targets],
        [x.role for x in targets],
    ):  # as short as it can be said
        short = {
            "target_modules": sorted(set(names)),
            "layers_to_transform": None if taken == blocks else taken,
        }
        if _targeted({**config, **short}, spec) == {layer.path for layer in targets}:
            config |= short
            break
    if model_type in SAME_NAMES:
        return (
            config,
            made,
            "Saved as PEFT has it; PeftModel.from_pretrained(base, path) and qlab open it.",
        )
    about = f"for model_type {model_type!r}" if model_type else "for this model"
    return (
        config,
        made,
        f"Saved as PEFT has it, with mlx-lm's names of layers; {about} transformers may have others.",
    )


def _refuse(lora: LoRAConfig, targets: Iterable[LayerSpec]) -> None:
    for layer in targets:
        obstacle = lora.adapter_kind.peft_obstacle(layer)
        if obstacle:
            raise ConfigError(f"{obstacle}; use format='mlx'.")
        if layer.kind == "switch":
            raise ConfigError(
                f"PEFT has no adapter of the experts {layer.path!r}: they are parts of larger tensors there; use format='mlx'."
            )
        if layer.kind == "embedding" and layer.tied:
            raise ConfigError(
                f"{layer.path!r} is the output head too, where PEFT would not apply the adapter; use format='mlx'."
            )


def from_peft(
    config: dict[str, Any], arrays: Arrays, spec: ModelSpec
) -> tuple[LoRAConfig, Arrays, tuple[str, ...]]:
    """Return an adapter from PEFT's settings and arrays.

    Ranks and alphas that differ by layer are brought to the largest rank and one scale, exactly:
    more columns of zeros, and B multiplied by the ratio of the scales.

    Raises:
        SettingError: the settings ask for something that qlab does not have.
        ConfigError: arrays are missing, unknown or of the wrong shape.
    """
    _check(config)
    found = _renamed(arrays, spec)
    paths = [layer.path for layer in spec.layers if layer.path in found]
    if (missing := sorted(_targeted(config, spec) - set(paths))) or not paths:
        raise ConfigError(
            f"it has no arrays of {missing[0] if missing else 'any layer'!r}, which target_modules names."
        )
    kind = _kind_of(config)
    needed = set(registry.get("adapters", kind).shapes((1, 1), 1))
    ranks = {}
    scales = {}
    for path in paths:
        if found[path].keys() != needed:
            odd = sorted(found[path].keys() ^ needed)[0]
            raise ConfigError(
                f"{path!r} has {'an' if odd in found[path] else 'no'} array {_theirs(spec[path], odd)!r}."
            )
        ranks[path] = _rank(config, path, found[path])
        alpha = _by_pattern(config.get("alpha_pattern"), path, config["lora_alpha"])
        scales[path] = alpha / (sqrt(ranks[path]) if config.get("use_rslora") else ranks[path])
    rank = max(ranks.values())
    scale = scales[next(path for path in paths if ranks[path] == rank)]
    lora = LoRAConfig(
        rank=rank,
        scale=scale,
        dropout=config.get("lora_dropout", 0.0),
        kind=kind,
    )
    lora = shortest_keys(lora, paths, spec)
    made = {
        f"{p}.{n}": _padded(n, a, rank, scales[p] / scale)
        for p, own in found.items()
        for n, a in own.items()
    }
    one = set(ranks.values()) == {rank} and set(scales.values()) == {scale}
    if one and config.get("use_rslora"):
        return replace(lora, rslora=True), made, ()
    note = f"Ranks {min(ranks.values())} to {rank} and their scales were brought to rank {rank} and scale {scale:g}, exactly."
    return lora, made, () if one else (note,)


def _kind_of(config: dict[str, Any]) -> str:
    """Return the name of the kind on the shelf that PEFT's settings mean."""
    wanted = {"use_dora": bool(config.get("use_dora"))}
    kinds = registry.shelf("adapters")
    return next(name for name, kind in kinds.items() if kind.peft_settings() == wanted)


def _check(config: dict[str, Any]) -> None:
    """Refuse settings that mean something qlab does not have; none is passed over."""
    if config["peft_type"] != "LORA":
        raise SettingError(f"peft_type {config['peft_type']!r} is not LORA.")
    for name, types in (("r", int), ("lora_alpha", (int, float)), ("lora_dropout", (int, float))):
        value = config.get(name, 0 if name == "lora_dropout" else None)
        if isinstance(value, bool) or not isinstance(value, types):
            raise SettingError(f"{name}={value!r} is not a number.")
    if not isinstance(config.get("target_modules"), (list, str)):
        raise SettingError(
            f"target_modules={config.get('target_modules')!r} is neither a list of names nor a pattern."
        )
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, dict):
            raise SettingError(f"{name}={config[name]!r} is not a table of numbers by name.")
    if config.get("init_lora_weights", True) not in _INITS:
        start = config["init_lora_weights"]
        raise SettingError(
            f"init_lora_weights={start!r} changes the base too; convert it to a plain LoRA with PEFT first."
        )
    for name, value in config.items():
        if name not in _READ and value and (name, value) != ("bias", "none"):
            raise SettingError(f"{name}={value!r} is not something that qlab has.")


def _renamed(arrays: Arrays, spec: ModelSpec) -> dict[str, Arrays]:
    """Return arrays by layer and by our names, the right way round."""
    found: dict[str, Arrays] = {}
    for key, array in arrays.items():
        theirs = next((name for name in _NAMES if key.endswith(f".{name}")), None)
        if theirs is None:
            raise ConfigError(
                f"{key!r} is no array of a LoRA.{nearest(key.rpartition('.lora')[2], _LINEAR)}"
            )
        ours = _NAMES[theirs]
        path = key.removesuffix(f".{theirs}").removeprefix(_PREFIX)
        if path not in spec.by_path:
            raise ConfigError(
                f"{key!r} belongs to a layer that the model does not have.{nearest(path, spec.by_path)}"
            )
        if spec[path].kind == "switch" or (spec[path].kind == "embedding") != (
            theirs in _EMBEDDING
        ):
            raise ConfigError(
                f"{key!r} is for another kind of layer; {path!r} is of kind {spec[path].kind}."
            )
        if spec[path].tied:
            raise ConfigError(
                f"{key!r} changes the look-up alone, and here {path!r} is the output head too."
            )
        if array.ndim != (1 if ours == "m" else 2):
            raise ConfigError(
                f"{key!r} has shape {array.shape}, not {1 if ours == 'm' else 2} axes."
            )
        found.setdefault(path, {})[ours] = array.T
    return found


def _theirs(layer: LayerSpec, ours: str) -> str:
    names = _EMBEDDING if layer.kind == "embedding" else _LINEAR
    return next((theirs for theirs, own in names.items() if own == ours), ours)


def _rank(config: dict[str, Any], path: str, own: Arrays) -> int:
    """Return a layer's rank if the settings and both factors agree on it."""
    said = _by_pattern(config.get("rank_pattern"), path, config["r"])
    held = own["lora_a"].shape[-1], own["lora_b"].shape[0]
    if held != (said, said):
        raise ConfigError(
            f"the factors of {path!r} have ranks {held[0]} and {held[1]}, and the settings say {said}."
        )
    return said


def _by_pattern(table: Any, path: str, default: Any) -> Any:
    """Look a layer up as PEFT does.

    The first key that is the end of its path, as a regular expression.
    """
    for key, value in (table or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            if not is_number(value) or value <= 0:
                raise SettingError(f"the pattern {key!r} gives {value!r}, not a number above 0.")
            return value
    return default


def _padded(name: str, array: mx.array, rank: int, ratio: float) -> mx.array:
    """Bring a factor to a larger rank and another scale without a change of the product."""
    if name == "lora_a":
        return mx.pad(array, [(0, 0), (0, rank - array.shape[1])])
    if name == "lora_b":
        return mx.pad(array if ratio == 1 else array * ratio, [(0, rank - array.shape[0]), (0, 0)])
    return array


def _targeted(config: dict[str, Any], spec: ModelSpec) -> set[str]:
    """Paths of the layers that PEFT's settings name (``peft/tuners/tuners_utils.py``,
    ``check_target_module_exists``).
    """
    names = config["target_modules"]
    out = config.get("exclude_modules") or []
    adapted = [
        layer for layer in spec.layers if layer.kind != "switch" and not _named(out, layer.path)
    ]
    if names == "all-linear":
        return {
            layer.path for layer in adapted if layer.kind == "linear" and layer.block is not None
        }
    if isinstance(names, str):
        return {layer.path for layer in adapted if _named(names, layer.path)}
    # a full name counts whatever the block
    return {
        x.path for x in adapted if x.path in names or (_named(names, x.path) and _within(config, x))
    }


def _within(config: dict[str, Any], layer: LayerSpec) -> bool:
    """Whether a layer is in one of the blocks that the settings name."""
    only = config.get("layers_to_transform")
    patterns = config.get("layers_pattern")
    only = [only] if isinstance(only, int) else only
    if not only:
        return True
    if not patterns:
        return layer.block in only
    patterns = [patterns] if isinstance(patterns, str) else patterns
    found = (re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", layer.path) for pattern in patterns)
    return any(match and int(match.group(1)) in only for match in found)


def _named(names: list[str] | str, path: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)
