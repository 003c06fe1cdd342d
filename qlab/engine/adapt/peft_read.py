"""Reads an adapter from PEFT's words, which ``peft.py`` writes.

Ranks and alphas may differ by layer there; here an adapter has one rank and one scale. Touches no
disk. Knows no base weights.
"""

from __future__ import annotations

import re
from dataclasses import replace
from math import sqrt
from typing import Any

import mlx.core as mx

from qlab import registry
from qlab.core.config.legal import is_number
from qlab.core.config.lora import LoRAConfig
from qlab.core.config.spec import LayerSpec, ModelSpec
from qlab.engine.adapt.mlx_layout import LoadedAdapter
from qlab.engine.adapt.peft import (
    EMBEDDING_NAMES,
    LINEAR_NAMES,
    PREFIX,
    Arrays,
    names_of,
    peft_targets_of,
)
from qlab.engine.adapt.targets import SettingError, shortest_keys
from qlab.errors import ConfigError, nearest

_NAMES = {**LINEAR_NAMES, **EMBEDDING_NAMES}
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
# the other initializations change the base's weights as well
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def from_peft(config: dict[str, Any], arrays: Arrays, spec: ModelSpec) -> LoadedAdapter:
    """Return an adapter from PEFT's settings and arrays.

    Ranks and alphas that differ by layer are brought to the largest rank and one scale, exactly:
    more columns of zeros, and B multiplied by the ratio of the scales.

    Raises:
        SettingError: the settings ask for something that qlab does not have.
        ConfigError: arrays are missing, unknown or of the wrong shape.
    """
    _check(config)
    by_layer = _renamed(arrays, spec)
    paths = [layer.path for layer in spec.layers if layer.path in by_layer]
    missing = sorted(peft_targets_of(config, spec) - set(paths))
    if missing or not paths:
        what = missing[0] if missing else "any layer"
        raise ConfigError(f"it has no arrays of {what!r}, which target_modules names.")
    kind = _kind_of(config)
    needed = set(registry.get("adapters", kind).shapes((1, 1), 1))
    is_rslora = bool(config.get("use_rslora"))
    ranks: dict[str, int] = {}
    scales: dict[str, float] = {}
    for path in paths:
        _check_names(spec[path], by_layer[path], needed)
        ranks[path] = _rank(config, path, by_layer[path])
        alpha = _by_pattern(config.get("alpha_pattern"), path, config["lora_alpha"])
        scales[path] = alpha / (sqrt(ranks[path]) if is_rslora else ranks[path])
    rank = max(ranks.values())
    scale = next(scales[path] for path in paths if ranks[path] == rank)
    lora = LoRAConfig(rank=rank, scale=scale, dropout=config.get("lora_dropout", 0.0), kind=kind)
    lora = shortest_keys(lora, paths, spec)
    padded = {
        f"{path}.{name}": _padded(name, array, rank, scales[path] / scale)
        for path, of_layer in by_layer.items()
        for name, array in of_layer.items()
    }
    is_uniform = set(ranks.values()) == {rank} and set(scales.values()) == {scale}
    if not is_uniform:
        note = (
            f"Ranks {min(ranks.values())} to {rank} and their scales were brought to "
            f"rank {rank} and scale {scale:g}, exactly."
        )
        return LoadedAdapter(lora, padded, (note,))
    return LoadedAdapter(replace(lora, rslora=is_rslora), padded)


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
    targets = config.get("target_modules")
    if not isinstance(targets, (list, str)):
        raise SettingError(f"target_modules={targets!r} is neither a list of names nor a pattern.")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, dict):
            raise SettingError(f"{name}={config[name]!r} is not a table of numbers by name.")
    init = config.get("init_lora_weights", True)
    if init not in _INITS:
        raise SettingError(
            f"init_lora_weights={init!r} changes the base too; "
            "convert it to a plain LoRA with PEFT first."
        )
    for name, value in config.items():
        if name not in _READ and value and (name, value) != ("bias", "none"):
            raise SettingError(f"{name}={value!r} is not something that qlab has.")


def _renamed(arrays: Arrays, spec: ModelSpec) -> dict[str, Arrays]:
    """Return arrays by layer and by qlab's names, transposed to qlab's shapes."""
    by_layer: dict[str, Arrays] = {}
    for key, array in arrays.items():
        theirs = next((name for name in _NAMES if key.endswith(f".{name}")), None)
        if theirs is None:
            hint = nearest(key.rpartition(".lora")[2], LINEAR_NAMES)
            raise ConfigError(f"{key!r} is no array of a LoRA.{hint}")
        path = key.removesuffix(f".{theirs}").removeprefix(PREFIX)
        _check_array(key, path, theirs, array, spec)
        by_layer.setdefault(path, {})[_NAMES[theirs]] = array.T
    return by_layer


def _check_array(key: str, path: str, theirs: str, array: mx.array, spec: ModelSpec) -> None:
    """Refuse an array of a layer that the model does not have, or that cannot have it."""
    if path not in spec.by_path:
        raise ConfigError(
            f"{key!r} belongs to a layer that the model does not have.{nearest(path, spec.by_path)}"
        )
    layer = spec[path]
    if layer.kind == "switch" or theirs not in names_of(layer):
        raise ConfigError(
            f"{key!r} is for another kind of layer; {path!r} is of kind {layer.kind}."
        )
    if layer.tied:
        raise ConfigError(
            f"{key!r} changes the look-up alone, and here {path!r} is the output head too."
        )
    axes = 1 if _NAMES[theirs] == "m" else 2
    if array.ndim != axes:
        raise ConfigError(f"{key!r} has shape {array.shape}, not {axes} axes.")


def _check_names(layer: LayerSpec, arrays: Arrays, needed: set[str]) -> None:
    """Refuse a layer that lacks an array, or has one too many."""
    odd = sorted(arrays.keys() ^ needed)
    if not odd:
        return
    theirs = {ours: theirs for theirs, ours in names_of(layer).items()}.get(odd[0], odd[0])
    article = "an" if odd[0] in arrays else "no"
    raise ConfigError(f"{layer.path!r} has {article} array {theirs!r}.")


def _rank(config: dict[str, Any], path: str, arrays: Arrays) -> int:
    """Return a layer's rank if the settings and both factors agree on it."""
    rank = _by_pattern(config.get("rank_pattern"), path, config["r"])
    of_a = arrays["lora_a"].shape[-1]
    of_b = arrays["lora_b"].shape[0]
    if (of_a, of_b) != (rank, rank):
        raise ConfigError(
            f"the factors of {path!r} have ranks {of_a} and {of_b}, and the settings say {rank}."
        )
    return rank


def _by_pattern(table: Any, path: str, default: Any) -> Any:
    """Look a layer up as PEFT does: the first key, as a pattern, that is the end of its path."""
    for key, value in (table or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            if not is_number(value) or value <= 0:
                raise SettingError(f"the pattern {key!r} gives {value!r}, not a number above 0.")
            return value
    return default


def _padded(name: str, array: mx.array, rank: int, ratio: float) -> mx.array:
    """Bring a factor to a larger rank and another scale without a change of the product.

    Args:
        name: ``lora_a`` ``(in, r)``, ``lora_b`` ``(r, out)`` or another array, which stays.
        array: of a layer whose rank r is not above ``rank``.
        rank: to bring it to, by zeros.
        ratio: of the layer's scale to the common one.
    """
    if name == "lora_a":
        return mx.pad(array, [(0, 0), (0, rank - array.shape[1])])
    if name == "lora_b":
        scaled = array if ratio == 1 else array * ratio
        return mx.pad(scaled, [(0, rank - array.shape[0]), (0, 0)])
    return array
