"""Writes model folders, and opens those that only qlab can open.

``Model.save`` calls ``save``. Layers in MLX's own modes go into an mlx-lm folder, which stock
mlx-lm opens. If a layer is in a mode of qlab's shelf, config.json gets a block ``qlab`` beside, and
``load`` hands the folder to ``open_packed``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qlab.core.config.quant import QuantConfig, QuantPlan
from qlab.core.saved import Saved
from qlab.engine.models.skeleton import skeleton
from qlab.engine.models.surgery import module_at, put_module
from qlab.nn.kinds import layer_kind
from qlab.nn.linear import Packed
from qlab.nn.stored import stored_layer
from qlab.runtime.atomic import write_folder
from qlab.runtime.device import mlx_version

_REPLACEABLE = (  # what a model's folder may hold and still be replaced
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates",
    "README.md",
)


_STORAGE_BLOCKS = ("quantization", "quantization_config", "qlab")  # of config.json; written anew
_STOCK_ARRAYS = ("weight", "scales", "biases")


def save(
    path: Path, module: nn.Module, tokenizer: Any, config: dict[str, Any], plan: QuantPlan | None
) -> Saved:
    """Write a model folder, whole or not at all.

    Args:
        path: of the folder; an existing one is replaced if it is empty or holds a model and nothing
            else.
        module: the model.
        tokenizer: mlx-lm's wrapper.
        config: contents of config.json before quantization.
        plan: what was quantized, or None for a model as it came.

    Returns:
        Where it is and which programs open it; prints as one sentence.

    Raises:
        SaveError: the disk is full, or the place cannot be written or holds other files; what stood
            there is untouched.
    """
    from mlx_lm.utils import save_config, save_model

    settings, foreign = _settings(module, config, plan)

    def fill(folder: Path) -> None:
        save_model(folder, module)
        save_config(settings, folder / "config.json")
        tokenizer.save_pretrained(folder)

    written = write_folder(path, fill, _REPLACEABLE)
    if foreign:
        modes = ", ".join(sorted(foreign))
        note = (
            f"Saved in qlab's own layout ({modes} is not known to mlx-lm); open it with qlab.load."
        )
        return Saved(note, path=written, opens_in=("qlab",))
    note = "Saved as an mlx-lm folder; mlx_lm.load and qlab.load open it."
    return Saved(note, path=written, opens_in=("mlx-lm", "qlab"))


def _settings(
    module: nn.Module, config: dict[str, Any], plan: QuantPlan | None
) -> tuple[dict[str, Any], set[str]]:
    """Return config.json with the storage of every layer, and its modes that mlx-lm cannot read."""
    settings = {key: value for key, value in config.items() if key not in _STORAGE_BLOCKS}
    stock = {}
    packed = {}
    for path, leaf in module.named_modules():
        if isinstance(leaf, Packed):
            packed[path] = _packed_entry(leaf)
        elif "scales" in leaf:
            stock[path] = {"group_size": leaf.group_size, "bits": leaf.bits, "mode": leaf.mode}
    if stock:
        settings["quantization"] = _stock_block(stock)
    if packed:
        settings["qlab"] = {"mlx_version": mlx_version(), "layers": packed}
    elif plan is not None:
        # mxfp4 changed meaning between mlx 0.32.2 and 0.32.4
        settings["qlab_made_with"] = {"mlx_version": mlx_version(), "plan": repr(plan)}
    return settings, {entry["mode"] for entry in packed.values()}


def _stock_block(storage: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """mlx-lm's block ``quantization``: the commonest settings, then the layers that differ."""
    entries = list(storage.values())
    common = max(entries, key=entries.count)
    different = {path: entry for path, entry in storage.items() if entry != common}
    return {**common, **different}


def _packed_entry(leaf: Packed) -> dict[str, Any]:
    """What config.json says of a layer whose mode only qlab knows."""
    return {
        "mode": leaf.config.mode,
        "bits": leaf.config.bits,
        "group_size": leaf.config.group_size,
        "shape": list(leaf.shape),
        "dtype": str(leaf.dtype).removeprefix("mlx.core."),
        "kind": layer_kind(leaf),
        "arrays": sorted(leaf.packed),
    }


def open_packed(path: Path, config: dict[str, Any]) -> nn.Module:
    """Open a folder in qlab's own layout.

    Args:
        path: of the folder.
        config: contents of its config.json.

    Returns:
        The model, evaluated, bit for bit as it was saved.
    """
    weights: dict[str, mx.array] = {}
    for file in sorted(path.glob("model*.safetensors")):
        arrays: Any = mx.load(str(file))  # a dict, for safetensors
        weights.update(arrays)
    module = skeleton(config)
    packed_layers = config["qlab"]["layers"]
    for layer, entry in packed_layers.items():
        _put_packed(module, layer, entry, weights)
    for name in weights:
        layer = name.removesuffix(".scales")
        if layer != name and layer not in packed_layers:
            _put_stock(module, layer, _stock_entry(config["quantization"], layer), weights)
    module.load_weights(list(weights.items()))
    mx.eval(module.parameters())
    return module


def _put_packed(
    module: nn.Module, layer: str, entry: dict[str, Any], weights: dict[str, mx.array]
) -> None:
    """Put a layer of one of qlab's own modes in the place of the dense one."""
    packed = {name: weights[f"{layer}.{name}"] for name in entry["arrays"]}
    config = QuantConfig(entry["mode"], entry["bits"], entry["group_size"])
    dtype = getattr(mx, entry["dtype"])
    leaf = stored_layer(packed, config, tuple(entry["shape"]), dtype, entry["kind"])
    if f"{layer}.bias" in weights:
        leaf.bias = weights[f"{layer}.bias"]
    put_module(module, layer, leaf)


def _put_stock(
    module: nn.Module, layer: str, entry: dict[str, Any], weights: dict[str, mx.array]
) -> None:
    """Put a layer of one of MLX's modes in the place of the dense one."""
    dense = module_at(module, layer)
    names = [name for name in _STOCK_ARRAYS if f"{layer}.{name}" in weights]
    packed = {name: weights[f"{layer}.{name}"] for name in names}
    config = QuantConfig(entry["mode"], entry["bits"], entry["group_size"])
    shape = dense.weight.shape
    leaf = stored_layer(packed, config, shape, dense.weight.dtype, layer_kind(dense))
    put_module(module, layer, leaf)


def _stock_entry(block: dict[str, Any], layer: str) -> dict[str, Any]:
    """Settings of a layer in mlx-lm's block: an entry of its own, or the common ones."""
    common = {key: value for key, value in block.items() if not isinstance(value, dict)}
    return block.get(layer, common)
