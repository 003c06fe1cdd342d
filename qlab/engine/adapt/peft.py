"""An adapter in PEFT's words: names, transposes, alpha for scale, targets by name.

``peft_read.py`` reads it again. Sources: PEFT 0.21 ``tuners/lora/config.py`` (options),
``tuners/lora/layer.py`` (forward, shapes) and ``utils/save_and_load.py`` (names in the file).
Touches no disk. Knows no base weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import mlx.core as mx

from qlab.core.config.lora import LoRAConfig
from qlab.core.config.spec import LayerSpec, ModelSpec
from qlab.errors import ConfigError

Arrays = dict[str, mx.array]
PREFIX = "base_model.model."
LINEAR_NAMES = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b", "lora_magnitude_vector": "m"}
EMBEDDING_NAMES = {"lora_embedding_A": "lora_a", "lora_embedding_B": "lora_b"}
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
    for layer in targets:
        _check_layer(lora, layer)
    renamed: Arrays = {}
    for layer in targets:
        for theirs, ours in names_of(layer).items():
            array = arrays.get(f"{layer.path}.{ours}")
            if array is not None:
                renamed[f"{PREFIX}{layer.path}.{theirs}"] = mx.contiguous(array.T)
    mx.eval(renamed)
    return _settings(lora, targets, spec, base_name), renamed, _note(model_type)


def _check_layer(lora: LoRAConfig, layer: LayerSpec) -> None:
    """Refuse a layer that PEFT cannot adapt in this way."""
    obstacle = lora.adapter_kind.peft_obstacle(layer)
    if obstacle is None and layer.kind == "switch":
        obstacle = (
            f"PEFT has no adapter of the experts {layer.path!r}: "
            "they are parts of larger tensors there"
        )
    if obstacle is None and layer.tied:
        obstacle = f"{layer.path!r} is the output head too, where PEFT would not apply the adapter"
    if obstacle:
        raise ConfigError(f"{obstacle}; use format='mlx'.")


def names_of(layer: LayerSpec) -> dict[str, str]:
    """Return qlab's names of a layer's arrays by PEFT's."""
    return EMBEDDING_NAMES if layer.kind == "embedding" else LINEAR_NAMES


def _settings(
    lora: LoRAConfig, targets: tuple[LayerSpec, ...], spec: ModelSpec, base_name: str
) -> dict[str, Any]:
    """Return PEFT's settings, with targets as short as they can be said."""
    paths = [layer.path for layer in targets]
    settings = {
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
        "target_modules": paths,
        "layers_to_transform": None,
    }
    blocks = sorted({layer.block for layer in targets if layer.block is not None})
    only = None if blocks == list(spec.blocks) else blocks
    roles = [layer.role for layer in targets]
    for names in ([role.split(".")[-1] for role in roles], roles):
        short = {"target_modules": sorted(set(names)), "layers_to_transform": only}
        if peft_targets_of({**settings, **short}, spec) == set(paths):
            return settings | short
    return settings


def _note(model_type: str | None) -> str:
    if model_type in SAME_NAMES:
        return "Saved as PEFT has it; PeftModel.from_pretrained(base, path) and qlab open it."
    about = f"for model_type {model_type!r}" if model_type else "for this model"
    return (
        "Saved as PEFT has it, with mlx-lm's names of layers; "
        f"{about} transformers may have others."
    )


def peft_targets_of(settings: Mapping[str, Any], spec: ModelSpec) -> set[str]:
    """Return the paths of the layers that PEFT's settings name.

    Source: ``check_target_module_exists`` in ``peft/tuners/tuners_utils.py``.
    """
    names = settings["target_modules"]
    excluded = settings.get("exclude_modules") or []
    layers = [
        layer
        for layer in spec.layers
        if layer.kind != "switch" and not _is_named(excluded, layer.path)
    ]
    if names == "all-linear":
        inside = [layer for layer in layers if layer.block is not None]
        return {layer.path for layer in inside if layer.kind == "linear"}
    if isinstance(names, str):
        return {layer.path for layer in layers if _is_named(names, layer.path)}
    return {layer.path for layer in layers if _is_target(layer, names, settings)}


def _is_target(layer: LayerSpec, names: Iterable[str], settings: Mapping[str, Any]) -> bool:
    if layer.path in names:  # a full name counts whatever the block
        return True
    return _is_named(names, layer.path) and _is_within(settings, layer)


def _is_within(settings: Mapping[str, Any], layer: LayerSpec) -> bool:
    """Whether a layer is in one of the blocks that the settings name."""
    only = settings.get("layers_to_transform")
    blocks = [only] if isinstance(only, int) else only
    if not blocks:
        return True
    patterns = settings.get("layers_pattern")
    if not patterns:
        return layer.block in blocks
    if isinstance(patterns, str):
        patterns = [patterns]
    for pattern in patterns:
        match = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", layer.path)
        if match and int(match.group(1)) in blocks:
            return True
    return False


def _is_named(names: Iterable[str] | str, path: str) -> bool:
    """Whether a list of names, or a pattern, names a path."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)
