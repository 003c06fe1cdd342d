"""An adapter in mlx-lm's words and back: the settings of its folder.

Arrays have mlx-lm's names already. Source: ``mlx_lm/tuner/utils.py``, ``load_adapters``. Touches no
disk and knows no base weights; ``files.py`` calls it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx

from qlab import registry
from qlab.core.config.legal import is_whole
from qlab.core.config.lora import LoRAConfig
from qlab.core.config.spec import ModelSpec
from qlab.engine.adapt.targets import (
    SettingError,
    layers_of,
    mlx_targets,
    mlx_targets_of,
    shortest_keys,
    why_not_mlx,
)
from qlab.errors import ConfigError, nearest

Arrays = dict[str, mx.array]
SETTINGS_FILE = "adapter_config.json"
_LORA_PARAMETERS = {"rank", "scale", "dropout", "keys"}


class LoadedAdapter(NamedTuple):
    """An adapter that was read from a folder.

    Attributes:
        config: what it is.
        arrays: its trainable arrays by path.
        notes: what to know about it, in sentences.
    """

    config: LoRAConfig
    arrays: Arrays
    notes: tuple[str, ...] = ()


def to_mlx(
    lora: LoRAConfig, spec: ModelSpec, base_name: str, unsaved: str
) -> tuple[dict[str, Any], str]:
    """Return mlx-lm's settings, and who can open them.

    Args:
        lora: the adapter.
        spec: the base's layers.
        base_name: hub id or folder of the base.
        unsaved: what the base is, if it is in no folder; else empty.
    """
    num_layers, keys = mlx_targets(lora, spec)
    config = {
        "fine_tune_type": lora.kind,
        "model": base_name,
        "num_layers": num_layers,
        "lora_parameters": {
            "rank": lora.rank,
            "scale": lora.scale,
            "dropout": lora.dropout,
            "keys": keys,
        },
    }
    return config, _note(why_not_mlx(lora, spec), base_name, unsaved)


def _note(obstacle: str | None, base_name: str, unsaved: str) -> str:
    if obstacle:
        return f"Saved in mlx-lm's layout, but stock mlx-lm cannot open it: {obstacle}. qlab can."
    if unsaved:
        return (
            f"Saved in mlx-lm's layout. It was trained on {unsaved}, which is in no folder yet: "
            "a.base.save('base') writes it, and mlx_lm.load('base', adapter_path=…) opens what "
            "was trained."
        )
    return f"Saved in mlx-lm's layout; mlx_lm.load({base_name!r}, adapter_path=…) and qlab open it."


def from_mlx(config: dict[str, Any], arrays: Arrays, spec: ModelSpec) -> LoadedAdapter:
    """Return an adapter from mlx-lm's settings and arrays.

    Raises:
        SettingError: the settings ask for something that qlab does not have.
        ConfigError: arrays are missing, unknown or of other layers than the settings name.
    """
    kind = _kind(config)
    settings = config.get("lora_parameters")
    if not isinstance(settings, dict) or not {"rank", "scale"} <= settings.keys():
        raise SettingError("lora_parameters must give rank and scale.")
    unknown = sorted(settings.keys() - _LORA_PARAMETERS)
    if unknown:
        raise SettingError(
            f"lora_parameters has {unknown[0]!r}, which is unknown; "
            "it may have rank, scale, dropout, keys."
        )
    names = set(registry.get("adapters", kind).shapes((1, 1), 1))
    paths = layers_of(arrays, names, spec)
    _check_layers(config.get("num_layers", -1), settings.get("keys"), paths, spec)
    lora = LoRAConfig(
        rank=settings["rank"],
        scale=settings["scale"],
        dropout=settings.get("dropout", 0.0),
        kind=kind,
    )
    return LoadedAdapter(shortest_keys(lora, paths, spec), arrays)


def _kind(config: dict[str, Any]) -> str:
    kind = config.get("fine_tune_type", "lora")
    kinds = registry.shelf("adapters")
    if kind in kinds:
        return kind
    why = f"is not {', '.join(kinds)}"
    if kind == "full":
        why = "holds whole layers, not an adapter; qlab trains adapters"
    raise SettingError(f"fine_tune_type {kind!r} {why}.{nearest(str(kind), kinds)}")


def _check_layers(num_layers: Any, keys: Any, paths: list[str], spec: ModelSpec) -> None:
    """Refuse settings that name other layers than the file has arrays of."""
    if not is_whole(num_layers):
        raise SettingError(f"num_layers={num_layers!r} is not a number of blocks.")
    is_list = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if keys is not None and not is_list:
        raise SettingError(f"keys={keys!r} is not a list of names.")
    named = mlx_targets_of(num_layers, keys, spec)
    missing = sorted(named - set(paths))
    unnamed = sorted(set(paths) - named)
    if missing:
        raise ConfigError(
            f"it has no arrays of {missing[0]!r}, "
            f"which num_layers and keys in {SETTINGS_FILE} adapt."
        )
    if unnamed:
        raise ConfigError(
            f"it has arrays of {unnamed[0]!r}, "
            f"which num_layers and keys in {SETTINGS_FILE} do not adapt."
        )
