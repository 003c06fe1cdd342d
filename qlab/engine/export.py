"""Turns a plan into a quantized model, and writes and reads model folders.

A folder whose every layer stock mlx-lm can read is written as mlx-lm writes it; any other in qlab's own layout, which
differs in one key of config.json (``qlab``: mode, bits, group size and shape of each layer that mlx-lm cannot read).
Knows no error and no panel.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from qlab import registry
from qlab.core.config import QuantConfig, QuantPlan
from qlab.core.panel import Progress
from qlab.core.spec import LayerSpec, ModelSpec
from qlab.engine.experts import PackedExperts
from qlab.engine.folder import write_folder
from qlab.engine.linear import Packed, PackedEmbedding, PackedLinear, dense_layer, weight_of
from qlab.engine.skeleton import skeleton
from qlab.engine.surgery import module_at, put_module, twin
from qlab.errors import ConfigError, WeightsError

_OWN = (  # what a model's folder may hold and still be replaced
    "config.json", "generation_config.json", "*.safetensors", "model.safetensors.index.json", "tokenizer*", "vocab.*",
    "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*", "additional_chat_templates", "README.md",
)  # fmt: skip


def chosen(spec: ModelSpec, plan: QuantPlan) -> dict[str, QuantConfig]:
    """Configs of the layers that a plan quantizes and can quantize, by path.

    Raises:
        LayerNotFoundError: an override names no layer.
        ConfigError: an override cannot hold its layer; names what can.
    """
    for path, config in plan.overrides.items():
        layer = spec[path]
        if config and (reason := layer.refusal(config)):
            raise ConfigError(f"Layer {path!r} cannot be stored as {config.label}: {reason}; {_instead(layer, config)}.")
    configs = {layer.path: plan.config_for(layer.path) for layer in spec.layers}
    return {path: config for path, config in configs.items() if config and spec[path].refusal(config) is None}


def _instead(layer: LayerSpec, config: QuantConfig) -> str:
    """What an override may be: the nearest group size that divides the layer, or None."""
    sizes = [] if layer.obstacle else [g for g in config.scheme.group_sizes if layer.shape[-1] % g == 0]
    if not sizes:
        return "give None, which keeps it as it is"
    return f"the nearest group size that does is {min(sizes, key=lambda g: abs(g - config.group_size))}"


def quantize(
    module: nn.Module, spec: ModelSpec, plan: QuantPlan, solver: str, input_power: dict[str, np.ndarray]
) -> Generator[Progress, None, nn.Module]:
    """Quantize a model, layer by layer, into a new model that shares everything else with the old one.

    Args:
        module: the model; it is not changed.
        spec: its layers.
        plan: the storage.
        solver: name of a solver on the shelf; layers that it cannot fill (other modes, no inputs seen) are rounded to nearest.
        input_power: by path, mean squares of the input features.

    Yields:
        Progress after each layer.

    Raises:
        WeightsError: a weight is NaN or infinite, or the plan quantizes no layer.
    """
    configs = chosen(spec, plan)
    if not configs:
        raise WeightsError(f"No layer of {spec.name!r} can be stored as {plan.default.label}; nothing to quantize.")
    made = twin(module)
    for n, (path, config) in enumerate(configs.items()):
        layer = module_at(module, path)
        put_module(made, path, quantized_layer(layer, path, config, solver, input_power.get(path)))
        yield Progress("quantizing", n + 1, len(configs))
    return made


def quantized_layer(layer: nn.Module, path: str, config: QuantConfig, solver: str, input_power: np.ndarray | None) -> nn.Module:
    """Return a layer stored under a config: MLX's own quantized class where that reads it, a packed one elsewhere."""
    weight = weight_of(layer)
    if not mx.isfinite(weight).all().item():
        raise WeightsError(f"Layer {path!r} holds NaN or infinite weights; nothing was quantized.")
    packed = solve(weight, config, solver, input_power)
    made = stored_layer(packed, config, weight.shape, weight.dtype, _class_of(layer))
    if "bias" in layer:
        made.bias = layer.bias
    mx.eval(made.parameters())
    return made


def solve(weight: mx.array, config: QuantConfig, solver: str, input_power: np.ndarray | None) -> dict[str, mx.array]:
    """Fill a scheme by a solver, or by rounding to nearest where the solver does not apply."""
    found = registry.get("solvers", solver)
    applies = (found.modes is None or config.mode in found.modes) and (input_power is not None or not found.needs_inputs)
    return found.solve(weight, config, input_power) if applies else config.scheme.quantize(weight, config)


def _class_of(layer: nn.Module) -> str:
    if hasattr(layer, "as_linear"):
        return "embedding"
    return "switch" if isinstance(layer, PackedExperts) or "Switch" in type(layer).__name__ else "linear"


def stored_layer(
    packed: dict[str, mx.array], config: QuantConfig, shape: tuple[int, ...], dtype: mx.Dtype, kind: str
) -> nn.Module:
    """Return a layer around packed arrays.

    Args:
        packed: arrays by parameter name.
        config: how they are packed.
        shape: of the weight as numbers.
        dtype: of the weight as numbers.
        kind: ``linear``, ``embedding`` or ``switch``.
    """
    mode = config.scheme.stock_mode
    if mode is None:
        own = {"linear": PackedLinear, "embedding": PackedEmbedding, "switch": PackedExperts}
        return own[kind](packed, config, shape, dtype)
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear

    kinds = {"linear": nn.QuantizedLinear, "embedding": nn.QuantizedEmbedding, "switch": QuantizedSwitchLinear}
    made = kinds[kind].__new__(kinds[kind])  # their own constructors would draw and quantize random weights
    nn.Module.__init__(made)
    made.group_size, made.bits, made.mode = config.group_size, config.bits, mode
    made.biases = None
    for name, value in packed.items():
        made[name] = value
    if kind == "embedding":
        made.num_embeddings, made.dims = shape
    if kind == "switch":
        made.global_scale = None
    made.freeze()
    return made


def dense_twin(
    module: nn.Module,
    spec: ModelSpec,
    plan: QuantPlan,
    solver: str,
    input_power: dict[str, np.ndarray],
    full: nn.Module,
) -> Generator[Progress, None, nn.Module]:
    """Return the model that a plan would give, with dense weights, for judging it where quantized products are slow.

    Args:
        module: the model whose weights are quantized.
        spec: its layers.
        plan: the storage.
        solver: name of a solver.
        input_power: by path, mean squares of the input features.
        full: the dense model to compute with; its dtype is taken.
    """
    configs = chosen(spec, plan)
    layers = {}
    for n, (path, config) in enumerate(configs.items()):
        weight = weight_of(module_at(module, path))
        target = module_at(full, path)
        values = config.scheme.dequantize(solve(weight, config, solver, input_power.get(path)), config, target.weight.dtype)
        layers[path] = dense_layer(target, values)
        mx.eval(values)
        yield Progress("rounding the weights", n + 1, len(configs))
    return twin(full, layers)


def save(path: Path, module: nn.Module, tokenizer: Any, config: dict[str, Any], plan: QuantPlan | None) -> str:
    """Write a model folder, whole or not at all.

    Args:
        path: of the folder; an existing one is replaced if it is empty or holds a model and nothing else.
        module: the model.
        tokenizer: mlx-lm's wrapper.
        config: contents of config.json before quantization.
        plan: what was quantized, or None for a model as it came.

    Returns:
        One sentence: who can open the folder.

    Raises:
        SaveError: the disk is full, or the place cannot be written or holds other files; what stood there is untouched.
    """
    from mlx_lm.utils import save_config, save_model

    facts, foreign = _facts(module, config, plan)

    def fill(folder: Path) -> None:
        save_model(folder, module)
        save_config(facts, folder / "config.json")
        tokenizer.save_pretrained(folder)

    write_folder(path, fill, _OWN)
    if foreign:
        return f"Saved in qlab's own layout ({', '.join(sorted(foreign))} is not known to mlx-lm); open it with qlab.load."
    return "Saved as an mlx-lm folder; mlx_lm.load and qlab.load open it."


def _facts(module: nn.Module, config: dict[str, Any], plan: QuantPlan | None) -> tuple[dict[str, Any], set[str]]:
    """Return config.json with the storage of every layer, and the modes in it that mlx-lm cannot read."""
    facts = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config", "qlab")}
    stock, own, foreign = {}, {}, set()
    for path, leaf in module.named_modules():
        if isinstance(leaf, Packed):
            foreign.add(leaf.config.mode)
            own[path] = {
                "mode": leaf.config.mode, "bits": leaf.config.bits, "group_size": leaf.config.group_size,
                "shape": list(leaf.shape), "dtype": str(leaf.dtype).removeprefix("mlx.core."),
                "kind": _class_of(leaf), "arrays": sorted(leaf.packed),
            }  # fmt: skip
        elif "scales" in leaf:
            stock[path] = {"group_size": leaf.group_size, "bits": leaf.bits, "mode": leaf.mode}
    if stock:
        common = max(stock.values(), key=list(stock.values()).count)
        facts["quantization"] = {**common, **{path: entry for path, entry in stock.items() if entry != common}}
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
        made = stored_layer(packed, kind, tuple(facts["shape"]), getattr(mx, facts["dtype"]), facts["kind"])
        if f"{layer}.bias" in weights:
            made.bias = weights[f"{layer}.bias"]
        put_module(module, layer, made)
        weights.update({f"{layer}.{name}": value for name, value in packed.items()})
    common = {key: value for key, value in config.get("quantization", {}).items() if not isinstance(value, dict)}
    for layer in {name.removesuffix(".scales") for name in weights if name.endswith(".scales")}:
        if layer in config["qlab"]["layers"]:
            continue
        entry = config["quantization"].get(layer, common)
        dense = module_at(module, layer)
        packed = {name: weights[f"{layer}.{name}"] for name in ("weight", "scales", "biases") if f"{layer}.{name}" in weights}
        kind = QuantConfig(entry["mode"], entry["bits"], entry["group_size"])
        put_module(module, layer, stored_layer(packed, kind, dense.weight.shape, dense.weight.dtype, _class_of(dense)))
    module.load_weights(list(weights.items()))
    mx.eval(module.parameters())
    return module
