"""Opens the structure of a model without its weights, from a config.json alone.

``qlab.estimate`` calls it: a config dict, a config.json, a folder or a hub id becomes a lazy model
whose shapes and dtypes are known and whose arrays are never made. Runs on the MLX thread.
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from qlab.core.config.legal import is_whole
from qlab.core.config.quant import QuantConfig, stock_config
from qlab.engine.io.source import fetch_config, find, read_settings
from qlab.engine.models.lazy_storage import stored
from qlab.engine.models.skeleton import describe, model_classes, skeleton
from qlab.errors import ConfigError, LoadError

_COUNTS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
    "moe_intermediate_size",
    "num_experts",
    "num_local_experts",
)
_BLOCKS = ("text_config", "quantization", "quantization_config")
_MOST = 2**31 - 1  # larger sizes do not fit into an int32


class Structure(NamedTuple):
    """A model without weights.

    Attributes:
        module: mlx-lm's model; its arrays are lazy.
        name: short name for headlines.
        config: contents of its config.json.
        notes: what the user should know about it.
    """

    module: nn.Module
    name: str
    config: dict[str, Any]
    notes: tuple[str, ...]


def structure(source: str | Path | dict[str, Any]) -> Structure:
    """Return a lazy model, its name, its config and what to know about it.

    Args:
        source: contents of a config.json, the path of one or of its folder, ``"demo"``, or a hub id
            (only its config.json is fetched).

    Raises:
        LoadError: nothing there, not a config, or of an unknown architecture.
        ConfigError: fields of the config are missing, not positive, or contradict each other.
    """
    name = ""
    if isinstance(source, dict):
        config = source
    else:
        config, name = _read(source)
    check(config)
    module = _module(config)
    storage = _storage_of_layers(module, config)
    if storage:
        module = stored(module, storage)
    name = name or config.get("_name_or_path") or config["model_type"]
    return Structure(module, name, config, _notes(config, bool(storage)))


def context(config: dict[str, Any]) -> int | None:
    """Tokens that a model was made for, or None if its config does not say."""
    text = config.get("text_config") or {}
    return config.get("max_position_embeddings") or text.get("max_position_embeddings")


def check(config: dict[str, Any]) -> None:
    """Refuse a config whose sizes cannot be.

    Raises:
        ConfigError: names the field and what it should be.
    """
    for key in _BLOCKS:
        if not isinstance(config.get(key) or {}, dict):
            raise ConfigError(
                f"The config's {key}={config[key]!r} is not legal; it is a block of settings."
            )
    for part in (config, config.get("text_config") or {}):
        _check_counts(part)
        _check_heads(part)


def _check_counts(part: dict[str, Any]) -> None:
    for key in _COUNTS:
        value = part.get(key)
        if value is not None and not (is_whole(value, 1) and value <= _MOST):
            legal = f"it is a whole number from 1 to {_MOST}"
            raise ConfigError(f"The config's {key}={value!r} is not legal; {legal}.")


def _check_heads(part: dict[str, Any]) -> None:
    heads = part.get("num_attention_heads")
    kv_heads = part.get("num_key_value_heads")
    width = part.get("hidden_size")
    contradiction = ""
    if heads and kv_heads and heads % kv_heads:
        contradiction = f"{heads} attention heads cannot share {kv_heads} key-value heads evenly"
    elif heads and width and not part.get("head_dim") and width % heads:
        contradiction = (
            f"hidden_size={width} is not a multiple of num_attention_heads={heads}, "
            "and there is no head_dim"
        )
    if contradiction:
        raise ConfigError(f"The config contradicts itself: {contradiction}.")


def _read(source: str | Path) -> tuple[dict[str, Any], str]:
    """Return a config and the model's name."""
    place = find(source)
    if place.path is None:
        return read_settings(fetch_config(place.text), "a model folder"), place.name
    if place.path.is_dir():
        return read_settings(place.path / "config.json", "a model folder"), place.name
    config = read_settings(place.path, "a model folder")
    if place.path.suffix == ".json":
        return config, place.path.resolve().parent.name
    return config, place.name


def _module(config: dict[str, Any]) -> nn.Module:
    try:
        return skeleton(config)
    except LoadError:
        missing = _missing(config)
        if not missing:
            raise
    # mlx-lm's own message names only a Python argument, so say which fields are absent
    needs = f"which a {config['model_type']!r} model needs"
    raise ConfigError(f"The config has no {' and no '.join(missing)}, {needs}.")


def _missing(config: dict[str, Any]) -> list[str]:
    """Names of the fields that a model cannot do without and that a config does not have."""
    arguments = fields(model_classes(config)[1])
    needed = [
        field.name
        for field in arguments
        if field.default is MISSING and field.default_factory is MISSING
    ]
    return [name for name in needed if config.get(name) is None]


def _notes(config: dict[str, Any], stored_quantized: bool) -> tuple[str, ...]:
    notes = []
    dtype = config.get("torch_dtype") or config.get("dtype")
    if dtype is not None and not isinstance(getattr(mx, str(dtype), None), mx.Dtype):
        weights = f"the weights are {dtype}, which MLX does not have"
        notes.append(f"config.json says that {weights}; they are counted as bfloat16.")
    foreign = config.get("quantization_config")
    if foreign and not stored_quantized:
        method = foreign.get("quant_method", "an unknown method")
        weights = f"the weights are stored by {method}"
        notes.append(f"config.json says that {weights}; they are counted as 16-bit weights.")
    return tuple(notes)


def _storage_of_layers(module: nn.Module, config: dict[str, Any]) -> dict[str, QuantConfig]:
    """Storage of the layers that a folder holds quantized already, by path.

    mlx-lm writes a block ``quantization``: common settings, and entries for layers that differ.
    qlab writes its own modes, which mlx-lm does not know, into a block ``qlab``.
    """
    common = config.get("quantization") or {}
    by_qlab = (config.get("qlab") or {}).get("layers", {})
    storage: dict[str, QuantConfig] = {}
    for layer in describe(module, "").layers:
        entry = by_qlab.get(layer.path) or common.get(layer.path, common)
        if not isinstance(entry, dict) or "bits" not in entry:
            continue  # False marks a layer that is left as it was
        if "group_size" not in entry:
            raise ConfigError("The config's quantization block has no group_size.")
        make = QuantConfig if layer.path in by_qlab else stock_config
        wanted = make(entry.get("mode", "affine"), entry["bits"], entry["group_size"])
        if layer.refusal(wanted) is None:
            storage[layer.path] = wanted
    return storage
