"""Which layers an adapter is on, in mlx-lm's words and back.

mlx-lm names layers by ``num_layers``, counted from the last block, and ``keys``: names within a
block, or full paths. ``files.py`` writes and reads them. Knows no arrays and no files.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from qlab.core.config.lora import LoRAConfig
from qlab.core.config.spec import ModelSpec
from qlab.errors import ConfigError, nearest


class SettingError(ConfigError):
    """The settings of an adapter folder ask for something that qlab does not have."""


def mlx_targets(lora: LoRAConfig, spec: ModelSpec) -> tuple[int, list[str]]:
    """Return ``num_layers`` and ``keys`` under which mlx-lm adapts exactly this adapter's layers.

    mlx-lm takes a key as a name within each of the last blocks, and as a path from the top of the
    model; so any set of layers can be said, by full paths if it must be.
    """
    paths = [layer.path for layer in lora.targets(spec)]
    short = _names_within_blocks(paths, spec)
    return short or (-1, paths)


def _names_within_blocks(paths: Iterable[str], spec: ModelSpec) -> tuple[int, list[str]] | None:
    """Say a set of layers as names within the last blocks, and as paths outside the blocks.

    None if that cannot be, since the layers differ by block.
    """
    layers = [spec[path] for path in paths]
    inside = [layer for layer in layers if layer.block is not None]
    outside = [layer.path for layer in layers if layer.block is None]
    roles = [layer.role for layer in inside]
    unique = dict.fromkeys([*roles, *outside])
    keys = list(unique)
    count = -1
    if inside:
        first = min(layer.block for layer in inside if layer.block is not None)
        count = len(spec.blocks) - spec.blocks.index(first)
    if count == len(spec.blocks):
        count = -1
    wanted = {layer.path for layer in layers}
    if mlx_targets_of(count, keys, spec) != wanted:
        return None
    return count, keys


def mlx_targets_of(num_layers: int, keys: Iterable[str] | None, spec: ModelSpec) -> set[str]:
    """Return the paths of the layers that mlx-lm adapts.

    Source: ``linear_to_lora_layers`` in ``mlx_lm/tuner/utils.py``.

    Args:
        num_layers: blocks, counted from the last; 0 or less means all.
        keys: names within a block, or full paths; None means every layer of the blocks.
        spec: the model's layers.
    """
    blocks = set(spec.blocks[-max(num_layers, 0) :])
    if keys is None:
        return {layer.path for layer in spec.layers if layer.block in blocks}
    names = set(keys)
    paths = set()
    for layer in spec.layers:
        is_named = layer.block in blocks and layer.role in names
        if is_named or layer.path in names:
            paths.add(layer.path)
    return paths


def why_not_mlx(lora: LoRAConfig, spec: ModelSpec) -> str | None:
    """Return why stock mlx-lm cannot run this adapter on this base; None if it can."""
    kind = lora.adapter_kind
    for layer in spec.layers:
        if layer.storage and layer.storage.scheme.stock_mode is None:
            return f"it cannot read the base ({layer.storage_label})"
    for layer in lora.targets(spec):
        obstacle = kind.mlx_obstacle(layer)
        if obstacle:
            return obstacle
    return None


def layers_of(arrays: Iterable[str], names: set[str], spec: ModelSpec) -> list[str]:
    """Return the paths of the layers that arrays belong to, in model order.

    Args:
        arrays: paths of arrays, such as ``model.layers.0.self_attn.q_proj.lora_a``.
        names: of the arrays that the kind has in each layer.
        spec: the model's layers.

    Raises:
        ConfigError: an array is of no layer of the model, or no array of an adapter.
    """
    paths = set()
    for key in arrays:
        path, _, name = key.rpartition(".")
        if name not in names:
            known = ", ".join(sorted(names))
            raise ConfigError(f"{key!r} is no array of such an adapter; they are called {known}.")
        if path not in spec.by_path:
            hint = nearest(path, spec.by_path)
            raise ConfigError(f"{key!r} belongs to a layer that the model does not have.{hint}")
        paths.add(path)
    return [layer.path for layer in spec.layers if layer.path in paths]


def shortest_keys(lora: LoRAConfig, paths: list[str], spec: ModelSpec) -> LoRAConfig:
    """Return an adapter's config with the shortest settings that name exactly these layers.

    Args:
        lora: everything but ``num_layers`` and ``keys``.
        paths: of the layers, in model order.
        spec: the model's layers.

    Raises:
        ConfigError: the kind does not adapt all of these layers.
    """
    attempts: list[tuple[int, tuple[str, ...] | None]] = [(-1, tuple(paths))]
    short = _names_within_blocks(paths, spec)
    if short:
        num_layers, keys = short
        attempts = [(num_layers, None), (num_layers, tuple(keys)), *attempts]
    for num_layers, keys in attempts:
        config = replace(lora, num_layers=num_layers, keys=keys)
        adapted = [layer.path for layer in config.targets(spec)]
        if adapted == paths:
            return config
    raise ConfigError(f"kind={lora.kind!r} does not adapt all of its layers, such as {paths[0]!r}.")
