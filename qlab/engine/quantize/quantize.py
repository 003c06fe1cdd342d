"""Turns a plan into a quantized model, and writes and reads model folders.

A folder whose every layer stock mlx-lm can read is written as mlx-lm writes it; any other in qlab's
own layout, which differs in one key of config.json (``qlab``: mode, bits, group size and shape of
each layer that mlx-lm cannot read). Knows no error and no panel.
"""

from __future__ import annotations

from collections.abc import Generator

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from qlab import registry
from qlab.core.config.quant import QuantConfig, QuantPlan
from qlab.core.config.spec import LayerSpec, ModelSpec
from qlab.core.progress import Progress
from qlab.engine.models.surgery import module_at, put_module, twin
from qlab.errors import ConfigError, WeightsError
from qlab.nn.kinds import layer_kind
from qlab.nn.linear import weight_of
from qlab.nn.stored import dense_layer, stored_layer


def chosen(spec: ModelSpec, plan: QuantPlan) -> dict[str, QuantConfig]:
    """Configs of the layers that a plan quantizes and can quantize, by path.

    Raises:
        LayerNotFoundError: an override names no layer.
        ConfigError: an override cannot hold its layer; names what can.
    """
    for path, config in plan.overrides.items():
        layer = spec[path]
        if config and (reason := layer.refusal(config)):
            raise ConfigError(
                f"Layer {path!r} cannot be stored as {config.label}: {reason}; {_instead(layer, config)}."
            )
    configs = {layer.path: plan.config_for(layer.path) for layer in spec.layers}
    return {
        path: config
        for path, config in configs.items()
        if config and spec[path].refusal(config) is None
    }


def _instead(layer: LayerSpec, config: QuantConfig) -> str:
    """What an override may be: the nearest group size that divides the layer, or None."""
    sizes = (
        [] if layer.obstacle else [g for g in config.scheme.group_sizes if layer.shape[-1] % g == 0]
    )
    if not sizes:
        return "give None, which keeps it as it is"
    return f"the nearest group size that does is {min(sizes, key=lambda g: abs(g - config.group_size))}"


def quantize(
    module: nn.Module,
    spec: ModelSpec,
    plan: QuantPlan,
    solver: str,
    input_power: dict[str, np.ndarray],
) -> Generator[Progress, None, nn.Module]:
    """Quantize a model, layer by layer, into a new model that shares everything else with the old
    one.

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
    made = twin(module)
    for n, (path, config) in enumerate(configs.items()):
        layer = module_at(module, path)
        put_module(made, path, quantized_layer(layer, path, config, solver, input_power.get(path)))
        yield Progress("quantizing", n + 1, len(configs))
    return made


def quantized_layer(
    layer: nn.Module, path: str, config: QuantConfig, solver: str, input_power: np.ndarray | None
) -> nn.Module:
    """Return a layer stored under a config.

    MLX's own quantized class where that reads it, a packed one elsewhere.
    """
    weight = weight_of(layer)
    if not mx.isfinite(weight).all().item():
        raise WeightsError(f"Layer {path!r} holds NaN or infinite weights; nothing was quantized.")
    packed = solve(weight, config, solver, input_power)
    made = stored_layer(packed, config, weight.shape, weight.dtype, layer_kind(layer))
    if "bias" in layer:
        made.bias = layer.bias
    mx.eval(made.parameters())
    return made


def solve(
    weight: mx.array, config: QuantConfig, solver: str, input_power: np.ndarray | None
) -> dict[str, mx.array]:
    """Fill a scheme by a solver, or by rounding to nearest where the solver does not apply."""
    found = registry.get("solvers", solver)
    applies = (found.modes is None or config.mode in found.modes) and (
        input_power is not None or not found.needs_inputs
    )
    return (
        found.solve(weight, config, input_power)
        if applies
        else config.scheme.quantize(weight, config)
    )


def dense_twin(
    module: nn.Module,
    spec: ModelSpec,
    plan: QuantPlan,
    solver: str,
    input_power: dict[str, np.ndarray],
    full: nn.Module,
) -> Generator[Progress, None, nn.Module]:
    """Return the model that a plan would give, with dense weights, for judging it where quantized
    products are slow.

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
        values = config.scheme.dequantize(
            solve(weight, config, solver, input_power.get(path)), config, target.weight.dtype
        )
        layers[path] = dense_layer(target, values)
        mx.eval(values)
        yield Progress("rounding the weights", n + 1, len(configs))
    return twin(full, layers)
