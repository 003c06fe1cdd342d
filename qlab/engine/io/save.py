"""Folders that stock mlx-lm opens; and those that only qlab opens, read back."""

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

    facts, foreign = _facts(module, config, plan)

    def fill(folder: Path) -> None:
        save_model(folder, module)
        save_config(facts, folder / "config.json")
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


def _facts(
    module: nn.Module, config: dict[str, Any], plan: QuantPlan | None
) -> tuple[dict[str, Any], set[str]]:
    """Return config.json with the storage of every layer, and the modes in it that mlx-lm cannot
    read.
    """
    facts = {
        key: value
        for key, value in config.items()
        if key not in ("quantization", "quantization_config", "qlab")
    }
    stock = {}
    own = {}
    foreign = set()
    for path, leaf in module.named_modules():
        if isinstance(leaf, Packed):
            foreign.add(leaf.config.mode)
            own[path] = {
                "mode": leaf.config.mode,
                "bits": leaf.config.bits,
                "group_size": leaf.config.group_size,
                "shape": list(leaf.shape),
                "dtype": str(leaf.dtype).removeprefix("mlx.core."),
                "kind": layer_kind(leaf),
                "arrays": sorted(leaf.packed),
            }
        elif "scales" in leaf:
            stock[path] = {"group_size": leaf.group_size, "bits": leaf.bits, "mode": leaf.mode}
    if stock:
        common = max(stock.values(), key=list(stock.values()).count)
        facts["quantization"] = {
            **common,
            **{path: entry for path, entry in stock.items() if entry != common},
        }
    if own:
        facts["qlab"] = {"mlx_version": mx.__version__, "layers": own}
    elif plan is not None:
        # mxfp4 changed meaning between mlx 0.32.2 and 0.32.4
        facts["qlab_made_with"] = {"mlx_version": mx.__version__, "plan": repr(plan)}
    return facts, foreign


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
        weights.update(mx.load(str(file)))
    module = skeleton(config)
    for layer, facts in config["qlab"]["layers"].items():
        packed = {name: weights.pop(f"{layer}.{name}") for name in facts["arrays"]}
        kind = QuantConfig(facts["mode"], facts["bits"], facts["group_size"])
        made = stored_layer(
            packed, kind, tuple(facts["shape"]), getattr(mx, facts["dtype"]), facts["kind"]
        )
        if f"{layer}.bias" in weights:
            made.bias = weights[f"{layer}.bias"]
        put_module(module, layer, made)
        weights.update({f"{layer}.{name}": value for name, value in packed.items()})
    common = {
        key: value
        for key, value in config.get("quantization", {}).items()
        if not isinstance(value, dict)
    }
    for layer in {name.removesuffix(".scales") for name in weights if name.endswith(".scales")}:
        if layer in config["qlab"]["layers"]:
            continue
        entry = config["quantization"].get(layer, common)
        dense = module_at(module, layer)
        packed = {
            name: weights[f"{layer}.{name}"]
            for name in ("weight", "scales", "biases")
            if f"{layer}.{name}" in weights
        }
        kind = QuantConfig(entry["mode"], entry["bits"], entry["group_size"])
        put_module(
            module,
            layer,
            stored_layer(packed, kind, dense.weight.shape, dense.weight.dtype, layer_kind(dense)),
        )
    module.load_weights(list(weights.items()))
    mx.eval(module.parameters())
    return module
