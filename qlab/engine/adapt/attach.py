"""Puts adapters on the layers of a model, in a twin that shares every array with it.

Used to train (``attach``) and to run a model with its adapter (the two twins).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from qlab.core.config.lora import LoRAConfig
from qlab.core.config.spec import ModelSpec
from qlab.engine.models.surgery import map_layers, module_at
from qlab.nn.experts import FrozenExperts
from qlab.nn.frozen import Compute, Frozen, usual_compute


def twin_with(
    module: nn.Module, spec: ModelSpec, lora: LoRAConfig, parameters: Mapping[str, mx.array]
) -> nn.Module:
    """Return a twin of a model that runs with adapters, for a token at a time; evaluated.

    Off the GPU its activations are float32: kernels for one token are six times as fast so (demo
    model, two cores).

    Args:
        module: the model; it is not changed.
        spec: its layers.
        lora: the adapters.
        parameters: their arrays by path.
    """
    compute = replace(usual_compute(), dequantize=False)
    running = _running(module, spec, lora, compute, parameters)
    mx.eval(running.parameters())
    return running


def twin_for_rows(
    module: nn.Module, spec: ModelSpec, lora: LoRAConfig | None, parameters: Mapping[str, mx.array]
) -> nn.Module:
    """Return a twin of a model for many tokens at once.

    Its products are made from dequantized weights where that is faster.

    Args:
        module: the model; it is not changed.
        spec: its layers.
        lora: the adapters; None for the bare model.
        parameters: their arrays by path.
    """
    return _running(module, spec, lora, usual_compute(), parameters)


def _running(
    module: nn.Module,
    spec: ModelSpec,
    lora: LoRAConfig | None,
    compute: Compute,
    parameters: Mapping[str, mx.array],
) -> nn.Module:
    """Return a twin with these parameters, frozen and not training."""
    running = attach(module, spec, lora, compute, False)
    running.update(tree_unflatten(list(parameters.items())))
    running.freeze()
    running.eval()
    return running


def attach(
    module: nn.Module, spec: ModelSpec, lora: LoRAConfig | None, compute: Compute, checkpoint: bool
) -> nn.Module:
    """Return a twin of a model that is frozen but for its adapters.

    Args:
        module: an mlx-lm model; it is not changed.
        spec: its layers.
        lora: the adapters; None for none.
        compute: how frozen layers are computed.
        checkpoint: whether blocks are computed again in the backward pass.

    Raises:
        ConfigError, LayerNotFoundError: the adapter does not fit the model.
    """
    targets = {layer.path for layer in lora.targets(spec)} if lora else set()
    wraps_all = compute.dequantize or compute.dtype is not None

    def wrapped(path: str, layer: nn.Module) -> nn.Module:
        is_target = path in targets
        if wraps_all or is_target:
            wrapper = FrozenExperts if spec[path].kind == "switch" else Frozen
            layer = wrapper(layer, compute.dtype, compute.dequantize, keep=checkpoint)
        if lora is None or not is_target:
            return layer
        return lora.adapter_kind.make(layer, spec[path].shape, lora)

    attached = map_layers(module, [layer.path for layer in spec.layers], wrapped)
    attached.freeze()
    if lora is not None:
        for path in targets:
            names = lora.adapter_kind.shapes(spec[path].shape, lora.rank)
            module_at(attached, path).unfreeze(keys=list(names), recurse=False)
    return attached
