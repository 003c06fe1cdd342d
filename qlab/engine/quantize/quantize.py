"""Turns a plan into a quantized model: a solver fills each layer's storage.

``ModelMeasurements.quantize`` and ``qlab.Quantizer`` call this; ``adapt`` uses it to store fused
weights. Writing the model to a folder is ``engine.io.save``'s.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from qlab import registry
from qlab.core.config.quant import QuantConfig, QuantPlan
from qlab.core.config.solver import Solver
from qlab.core.config.spec import LayerSpec, ModelSpec
from qlab.core.progress import Progress
from qlab.engine.models.surgery import module_at, put_module, twin
from qlab.errors import ConfigError, WeightsError
from qlab.nn.kinds import layer_kind
from qlab.nn.linear import weight_of
from qlab.nn.stored import dense_layer, stored_layer

InputPower = Mapping[str, np.ndarray]  # by path: mean square of each input feature, ``(in,)``


def chosen(spec: ModelSpec, plan: QuantPlan) -> dict[str, QuantConfig]:
    """Return the configs of the layers that a plan quantizes and can quantize, by path.

    Raises:
        LayerNotFoundError: an override names no layer.
        ConfigError: an override cannot hold its layer; names what can.
    """
    for path, override in plan.overrides.items():
        layer = spec[path]
        reason = layer.refusal(override) if override else None
        if override and reason:
            raise ConfigError(
                f"Layer {path!r} cannot be stored as {override.label}: {reason}; "
                f"{_instead(layer, override)}."
            )
    configs: dict[str, QuantConfig] = {}
    for layer in spec.layers:
        config = plan.config_for(layer.path)
        if config is not None and layer.refusal(config) is None:
            configs[layer.path] = config
    return configs


def _instead(layer: LayerSpec, config: QuantConfig) -> str:
    """Say what an override may be: the nearest group size that divides the layer, or None."""
    sizes = [size for size in config.scheme.group_sizes if layer.shape[-1] % size == 0]
    if layer.obstacle or not sizes:
        return "give None, which keeps it as it is"
    best = min(sizes, key=lambda size: abs(size - config.group_size))
    return f"the nearest group size that does is {best}"


def quantize(
    module: nn.Module, spec: ModelSpec, plan: QuantPlan, solver: str, input_power: InputPower
) -> Generator[Progress, None, nn.Module]:
    """Quantize a model, layer by layer, into a new model that shares everything else with it.

    Args:
        module: the model; it is not changed.
        spec: its layers.
        plan: the storage.
        solver: name of a solver on the shelf; layers that it cannot fill (other modes, no inputs
            seen) are rounded to nearest.
        input_power: by path, mean squares of the input features.

    Yields:
        Progress after each layer.

    Raises:
        WeightsError: a weight is NaN or infinite, or the plan quantizes no layer.
    """
    configs = chosen(spec, plan)
    if not configs:
        raise WeightsError(
            f"No layer of {spec.name!r} can be stored as {plan.default.label}; nothing to quantize."
        )
    quantized = twin(module)
    for n, (path, config) in enumerate(configs.items()):
        layer = module_at(module, path)
        replacement = quantized_layer(layer, path, config, solver, input_power.get(path))
        put_module(quantized, path, replacement)
        yield Progress("quantizing", n + 1, len(configs))
    return quantized


def quantized_layer(
    layer: nn.Module, path: str, config: QuantConfig, solver: str, input_power: np.ndarray | None
) -> nn.Module:
    """Return a layer stored under a config.

    It is MLX's own quantized class where that reads the storage, a packed one of ``qlab.nn``
    elsewhere.

    Args:
        layer: linear, embedding or experts; it is not changed.
        path: for the error message.
        config: the storage.
        solver: name of a solver on the shelf.
        input_power: mean square of each input feature, ``(in,)``, or None.

    Raises:
        WeightsError: a weight is NaN or infinite.
    """
    weight = weight_of(layer)
    if not mx.isfinite(weight).all().item():
        raise WeightsError(f"Layer {path!r} holds NaN or infinite weights; nothing was quantized.")
    packed = solve(weight, config, solver, input_power)
    stored = stored_layer(packed, config, weight.shape, weight.dtype, layer_kind(layer))
    if "bias" in layer:
        stored.bias = layer.bias
    mx.eval(stored.parameters())
    return stored


def solve(
    weight: mx.array, config: QuantConfig, solver: str, input_power: np.ndarray | None
) -> dict[str, mx.array]:
    """Return a weight packed by a solver, or rounded to nearest where the solver does not apply.

    Args:
        weight: ``(…, out, in)``.
        config: the storage.
        solver: name of a solver on the shelf.
        input_power: mean square of each input feature, ``(in,)``, or None.
    """
    filler: Solver = registry.get("solvers", solver)
    fills_mode = filler.modes is None or config.mode in filler.modes
    has_inputs = input_power is not None or not filler.needs_inputs
    if fills_mode and has_inputs:
        return filler.solve(weight, config, input_power)
    return config.scheme.quantize(weight, config)


def dense_twin(
    module: nn.Module,
    spec: ModelSpec,
    plan: QuantPlan,
    solver: str,
    input_power: InputPower,
    full: nn.Module,
) -> Generator[Progress, None, nn.Module]:
    """Return the model that a plan would give, with dense weights.

    Used to evaluate a plan where quantized products are slow.

    Args:
        module: the model whose weights are quantized.
        spec: its layers.
        plan: the storage.
        solver: name of a solver.
        input_power: by path, mean squares of the input features.
        full: the dense model to compute with; its dtype is taken.

    Yields:
        Progress after each layer.
    """
    configs = chosen(spec, plan)
    layers: dict[str, nn.Module] = {}
    for n, (path, config) in enumerate(configs.items()):
        target = module_at(full, path)
        weight = weight_of(module_at(module, path))
        packed = solve(weight, config, solver, input_power.get(path))
        values = config.scheme.dequantize(packed, config, target.weight.dtype)
        layers[path] = dense_layer(target, values)
        mx.eval(values)
        yield Progress("rounding the weights", n + 1, len(configs))
    return twin(full, layers)
