"""Opens the structure of a model without its weights.

From a config dict, a config.json, a folder or a hub id.

Runs on the MLX thread. Knows no memory.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qlab.core.config.legal import is_whole
from qlab.core.config.quant import QuantConfig, stock_config
from qlab.engine.models.lazy_storage import stored
from qlab.engine.models.skeleton import describe, model_classes, skeleton
from qlab.errors import ConfigError, LoadError
from qlab.runtime.paths import ASSETS

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


def structure(
    source: str | Path | dict[str, Any],
) -> tuple[nn.Module, str, dict[str, Any], tuple[str, ...]]:
    """Return a lazy model, its name, its config and what to know about it.

    Args:
        source: contents of a config.json, the path of one or of its folder, ``"demo"``, or a hub id
            (only its config.json is fetched).

    Raises:
        LoadError: nothing there, not a config, or of an unknown architecture.
        ConfigError: fields of the config are missing, not positive, or contradict each other.
    """
    config, name = (source, "") if isinstance(source, dict) else _read(source)
    check(config)
    try:
        module = skeleton(config)
    except LoadError:
        if missing := _missing(config):
            needs = f"which a {config['model_type']!r} model needs"
            raise ConfigError(f"The config has no {' and no '.join(missing)}, {needs}.") from None
        raise
    notes = []
    dtype = config.get("torch_dtype") or config.get("dtype")
    if dtype is not None and not isinstance(getattr(mx, str(dtype), None), mx.Dtype):
        notes.append(
            f"config.json says that the weights are {dtype}, which MLX does not have; they are counted as bfloat16."
        )
    configs = _configs(module, config)
    if configs:
        module = stored(module, configs)
    elif config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "an unknown method")
        notes.append(
            f"config.json says that the weights are stored by {method}; they are counted as 16-bit weights."
        )
    return module, name or config.get("_name_or_path") or config["model_type"], config, tuple(notes)


def context(config: dict[str, Any]) -> int | None:
    """Tokens that a model was made for, or None if its config does not say."""
    text = config.get("text_config") or {}
    return config.get("max_position_embeddings") or text.get("max_position_embeddings")


def check(config: dict[str, Any]) -> None:
    """Refuse a config whose sizes cannot be.

    Raises:
        ConfigError: names the field and what it should be.
    """
    for key in ("text_config", "quantization", "quantization_config"):
        if not isinstance(config.get(key) or {}, dict):
            raise ConfigError(
                f"The config's {key}={config[key]!r} is not legal; it is a block of settings."
            )
    for part in (config, config.get("text_config") or {}):
        for key in _COUNTS:
            value = part.get(key)
            if value is not None and not (is_whole(value, 1) and value < 2**31):
                raise ConfigError(
                    f"The config's {key}={value!r} is not legal; it is a whole number from 1 to {2**31 - 1}."
                )
        heads, kv, width = (
            part.get(k) for k in ("num_attention_heads", "num_key_value_heads", "hidden_size")
        )
        if heads and kv and heads % kv:
            raise ConfigError(
                f"The config contradicts itself: {heads} attention heads cannot share {kv} key-value heads evenly."
            )
        if heads and width and not part.get("head_dim") and width % heads:
            raise ConfigError(
                f"The config contradicts itself: hidden_size={width} is not a multiple of num_attention_heads={heads}, "
                "and there is no head_dim."
            )


def _missing(config: dict[str, Any]) -> list[str]:
    """Names of the fields that a model cannot do without and that a config does not have."""
    needed = [
        f
        for f in fields(model_classes(config)[1])
        if f.default is MISSING and f.default_factory is MISSING
    ]
    return [f.name for f in needed if config.get(f.name) is None]


def _read(source: str | Path) -> tuple[dict[str, Any], str]:
    path = ASSETS / "demo" if str(source) == "demo" else Path(source).expanduser()
    name = path.resolve().parent.name if path.suffix == ".json" else path.name
    if path.is_dir():
        path = path / "config.json"
    elif not path.is_file():
        path = _fetched(str(source))
        name = str(source)
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise LoadError(f"{path.parent} has no config.json, so it is not a model folder.") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise LoadError(f"{path} is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise LoadError(f"{path} holds no settings.")
    return config, name


def _fetched(source: str) -> Path:
    if (
        source.startswith((".", "/", "~"))
        or source.count("/") != 1
        or source.endswith((".json", ".gguf"))
    ):
        raise LoadError(
            f"There is no config at {source!r}: neither a config.json, a folder with one, nor a hub id (owner/name)."
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError

    try:
        return Path(hf_hub_download(source, "config.json"))
    except RepositoryNotFoundError as error:
        raise LoadError(
            f"The hub has no model {source!r}, or it is private and you are not logged in."
        ) from error
    except EntryNotFoundError as error:
        if isinstance(error, HfHubHTTPError):
            raise LoadError(f"{source!r} on the hub has no config.json.") from error
        raise LoadError(
            f"{source!r} is not a local folder, and the hub could not be reached."
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise LoadError(
            f"{source!r} is not a local folder, and the hub could not be reached ({type(error).__name__}). "
            "Check the spelling and the network, or give a config.json."
        ) from error


def _configs(module: nn.Module, config: dict[str, Any]) -> dict[str, QuantConfig]:
    """Storage of the layers that a folder already holds quantized, by path.

    Mlx-lm's block and qlab's own.
    """
    block = config.get("quantization") or {}
    found: dict[str, QuantConfig] = {}
    own = (config.get("qlab") or {}).get("layers", {})
    for layer in describe(module, "").layers:
        entry = own.get(layer.path) or block.get(layer.path, block)
        if isinstance(entry, dict) and "bits" in entry:
            make = QuantConfig if layer.path in own else stock_config
            if "group_size" not in entry:
                raise ConfigError("The config's quantization block has no group_size.")
            wanted = make(entry.get("mode", "affine"), entry["bits"], entry["group_size"])
            if layer.refusal(wanted) is None:
                found[layer.path] = wanted
    return found
