"""Which layers an adapter is on, in mlx-lm's words and back.

``num_layers``, names within a block, full paths.

Knows no arrays and no files.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from qlab.core.config.lora import LoRAConfig
from qlab.core.config.spec import ModelSpec
from qlab.errors import ConfigError, nearest

STOCK = ("lora", "dora")  # kinds that mlx-lm and PEFT have too


class SettingError(ConfigError):
    """The settings of an adapter folder ask for something that qlab does not have."""


def mlx_targets(lora: LoRAConfig, spec: ModelSpec) -> tuple[int, list[str]]:
    """Return ``num_layers`` and ``keys`` under which stock mlx-lm adapts exactly this adapter's
    layers.

    mlx-lm takes a key as a name within each of the last blocks, and as a path from the top of the
    model; so any set of layers can be said, by full paths if it must be.
    """
    paths = [layer.path for layer in lora.targets(spec)]
    return _words(paths, spec) or (-1, paths)


def _words(paths: Iterable[str], spec: ModelSpec) -> tuple[int, list[str]] | None:
    """Say a set of layers as names within the last blocks, and paths outside the blocks.

    None if that cannot be.
    """
    wanted = [spec[path] for path in paths]
    blocks = spec.blocks
    inside = [layer for layer in wanted if layer.block is not None]
    first = min((layer.block for layer in inside), default=blocks[0] if blocks else 0)
    count = len(blocks) - blocks.index(first) if inside else -1
    keys = dict.fromkeys(
        [layer.role for layer in inside] + [layer.path for layer in wanted if layer.block is None]
    )
    count = -1 if count == len(blocks) else count
    return (
        (count, list(keys))
        if reached(count, keys, spec) == {layer.path for layer in wanted}
        else None
    )


def reached(num_layers: int, keys: Iterable[str] | None, spec: ModelSpec) -> set[str]:
    """Paths of the layers that mlx-lm adapts (``mlx_lm/tuner/utils.py``,
    ``linear_to_lora_layers``).
    """
    blocks = spec.blocks
    taken = set(blocks[-max(num_layers, 0) :])
    inside = {
        layer.path
        for layer in spec.layers
        if layer.block in taken and (keys is None or layer.role in keys)
    }
    return inside | {layer.path for layer in spec.layers if keys is not None and layer.path in keys}


def mlx_obstacle(lora: LoRAConfig, spec: ModelSpec) -> str | None:
    """Say why stock mlx-lm cannot run this adapter on this base, or return None if it can."""
    if lora.kind not in STOCK:
        return f"it has no kind {lora.kind!r}"
    for layer in spec.layers:
        if layer.storage and layer.storage.scheme.stock_mode is None:
            return f"it cannot read the base ({layer.storage_label})"
    for layer in lora.targets(spec) if lora.kind == "dora" else ():
        bits = layer.storage.bits if layer.storage else 8
        if layer.kind == "switch":
            return f"it has no DoRA of experts ({layer.path!r}); kind='lora' is the nearest"
        if layer.kind == "embedding" and layer.storage:
            return f"its DoRA reads no quantized embedding ({layer.path!r})"
        if 32 % bits:
            return f"its DoRA fails on {bits}-bit weights ({layer.path!r})"
    return None


def layers_of(arrays: Iterable[str], names: set[str], spec: ModelSpec) -> list[str]:
    """Return the layers that arrays belong to, in model order.

    Raises:
        ConfigError: an array is of no layer of the model, or no array of an adapter.
    """
    found = set()
    for key in arrays:
        path, _, name = key.rpartition(".")
        if name not in names:
            raise ConfigError(
                f"{key!r} is no array of such an adapter; they are called {', '.join(sorted(names))}."
            )
        if path not in spec.by_path:
            raise ConfigError(
                f"{key!r} belongs to a layer that the model does not have.{nearest(path, spec.by_path)}"
            )
        found.add(path)
    return [layer.path for layer in spec.layers if layer.path in found]


def said(lora: LoRAConfig, paths: list[str], spec: ModelSpec) -> LoRAConfig:
    """Return an adapter's config with the shortest ``num_layers`` and ``keys`` that name exactly
    these layers.
    """
    words = _words(paths, spec)
    tries = [(words[0], None), (words[0], tuple(words[1]))] if words else []
    for num_layers, keys in [*tries, (-1, tuple(paths))]:
        made = replace(lora, num_layers=num_layers, keys=keys)
        if [layer.path for layer in made.targets(spec)] == paths:
            return made
    raise ConfigError(f"kind={lora.kind!r} does not adapt all of its layers, such as {paths[0]!r}.")
