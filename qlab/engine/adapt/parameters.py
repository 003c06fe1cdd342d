"""Parameters of an adapter outside training: fresh ones, and a check of any others.

Knows only the default initialization. Runs on the MLX thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from qlab.core.config.legal import check_whole
from qlab.core.config.lora import LoRAConfig
from qlab.core.config.spec import ModelSpec
from qlab.engine.adapt.attach import attach
from qlab.errors import ConfigError, WeightsError, nearest
from qlab.nn.frozen import Compute

_SHOWN = 5  # faults that a message names


def fresh(module: nn.Module, spec: ModelSpec, lora: LoRAConfig, seed: int) -> dict[str, mx.array]:
    """Return the parameters of adapters that change nothing yet, evaluated.

    Always the same for a seed; MLX's random state goes on as if nothing had been drawn.

    Args:
        module: the model; it is not changed.
        spec: its layers.
        lora: the adapters.
        seed: of what is drawn.

    Raises:
        ConfigError, LayerNotFoundError: the adapter does not fit the model.
    """
    check_whole("seed", seed, 0)
    # the state cannot be put back, only seeded anew
    later: Any = mx.random.randint(0, 2**31 - 1).item()
    try:
        mx.random.seed(seed)
        attached = attach(module, spec, lora, Compute(None, False), False)
        parameters = dict(tree_flatten(attached.trainable_parameters()))
        mx.eval(parameters)
    finally:
        mx.random.seed(later)
    return parameters


def expected(spec: ModelSpec, lora: LoRAConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all trainable arrays by path."""
    return {
        f"{layer.path}.{name}": shape
        for layer in lora.targets(spec)
        for name, shape in lora.adapter_kind.shapes(layer.shape, lora.rank, layer.kind).items()
    }


def arrays_of(arrays: Mapping[str, mx.array], path: str) -> dict[str, mx.array]:
    """Return the arrays of one layer by name, such as ``lora_a``, from those by path."""
    prefix = f"{path}."
    names = {key.removeprefix(prefix): key for key in arrays if key.startswith(prefix)}
    return {name: arrays[key] for name, key in names.items() if "." not in name}


def checked(
    parameters: Mapping[str, mx.array], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, mx.array]:
    """Return parameters, evaluated, if they are those that an adapter has.

    Raises:
        ConfigError: other paths or shapes; names up to five of them.
        WeightsError: a number is NaN or infinite.
    """
    faults = _faults(parameters, shapes)
    if faults:
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise ConfigError(
            f"These are not the adapter's parameters: {'; '.join(faults[:_SHOWN])}{more}."
        )
    arrays = dict(parameters)
    finite = {path: mx.isfinite(array).all() for path, array in arrays.items()}
    mx.eval(arrays, finite)
    bad = [path for path, is_finite in finite.items() if not is_finite.item()]
    if bad:
        raise WeightsError(
            f"{len(bad)} adapter arrays hold NaN or infinity, first {bad[0]!r}; "
            "the adapter stays as it was."
        )
    return arrays


def _faults(parameters: Mapping[str, mx.array], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Say what is missing, what is unknown, and what has another shape."""
    missing = [f"{path!r} is missing" for path in shapes if path not in parameters]
    unknown = [
        f"{path!r} belongs to no adapter.{nearest(path, shapes)}"
        for path in parameters
        if path not in shapes
    ]
    misshapen = [
        f"{path!r} has shape {parameters[path].shape}, not {shape}"
        for path, shape in shapes.items()
        if path in parameters and tuple(parameters[path].shape) != shape
    ]
    return missing + unknown + misshapen
