"""A model with an adapter, for use outside training.

Fresh parameters, checked ones, and a twin that runs with them.

Knows no start but the default one. Runs on the MLX thread.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from qlab.core.config.legal import check_whole
from qlab.core.config.lora import LoRAConfig
from qlab.core.config.spec import ModelSpec
from qlab.engine.adapt.attach import attach
from qlab.errors import ConfigError, WeightsError, nearest
from qlab.nn.frozen import Compute

_SHOWN = 5


def fresh(module: nn.Module, spec: ModelSpec, lora: LoRAConfig, seed: int) -> dict[str, mx.array]:
    """Return the parameters of adapters that change nothing yet, evaluated.

    Always the same for a seed.

    Args:
        module: the model; it is not changed.
        spec: its layers.
        lora: the adapters.
        seed: of what is drawn.

    Raises:
        ConfigError, LayerNotFoundError: the adapter does not fit the model.
    """
    check_whole("seed", seed, 0)
    later = mx.random.randint(0, 2**31 - 1).item()  # the state cannot be put back, only sown anew
    try:
        mx.random.seed(seed)
        made = dict(
            tree_flatten(
                attach(module, spec, lora, Compute(None, False), False).trainable_parameters()
            )
        )
        mx.eval(made)
    finally:
        mx.random.seed(later)
    return made


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
    faults = [f"{path!r} is missing" for path in shapes if path not in parameters]
    faults += [
        f"{path!r} belongs to no adapter.{nearest(path, shapes)}"
        for path in parameters
        if path not in shapes
    ]
    faults += [
        f"{path!r} has shape {parameters[path].shape}, not {shape}"
        for path, shape in shapes.items()
        if path in parameters and tuple(parameters[path].shape) != shape
    ]
    if faults:
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise ConfigError(
            f"These are not the adapter's parameters: {'; '.join(faults[:_SHOWN])}{more}."
        )
    made = dict(parameters)
    finite = {path: mx.isfinite(array).all() for path, array in made.items()}
    mx.eval(made, finite)
    bad = [path for path, fine in finite.items() if not fine.item()]
    if bad:
        raise WeightsError(
            f"{len(bad)} adapter arrays hold NaN or infinity, first {bad[0]!r}; the adapter stays as it was."
        )
    return made
