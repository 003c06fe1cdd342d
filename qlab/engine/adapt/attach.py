"""Puts adapters on the layers of a model, and takes twins of it."""

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
    """Return a twin of a model that runs with adapters; it shares every array of the model.

    Off the GPU its activations are float32: kernels for one token are six times as fast so (demo
    model, two cores).

    Args:
        module: the model; it is not changed.
        spec: its layers.
        lora: the adapters.
        parameters: their arrays by path.
    """
    compute = replace(usual_compute(), dequantize=False)
    made = attach(module, spec, lora, compute, False)
    made.update(tree_unflatten(list(parameters.items())))
    made.freeze()
    made.eval()
    mx.eval(made.parameters())
    return made


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
    made = attach(module, spec, lora, usual_compute(), False)
    made.update(tree_unflatten(list(parameters.items())))
    made.freeze()
    made.eval()
    return made


def attach(
    module: nn.Module, spec: ModelSpec, lora: LoRAConfig | None, compute: Compute, checkpoint: bool
) -> nn.Module:
    """Return a twin of a model, frozen but for the adapters, with its products made as told.

    Args:
        module: an mlx-lm model; it is not changed.
        spec: its layers.
        lora: the adapters; None for none.
        compute: how frozen layers are computed.
        checkpoint: whether blocks are computed again on the way back.

    Raises:
        ConfigError, LayerNotFoundError: the adapter does not fit the model.
    """
    targets = {layer.path for layer in lora.targets(spec)} if lora else set()

    def make(path: str, layer: nn.Module) -> nn.Module:
        if compute.dequantize or compute.dtype is not None or path in targets:
            frozen = FrozenExperts if spec[path].kind == "switch" else Frozen
            layer = frozen(layer, compute.dtype, compute.dequantize, keep=checkpoint)
        return lora.adapter_kind.make(layer, spec[path].shape, lora) if path in targets else layer  # type: ignore

    made = map_layers(module, [layer.path for layer in spec.layers], make)
    made.freeze()
    for path in targets:
        module_at(made, path).unfreeze(
            keys=list(lora.adapter_kind.shapes(spec[path].shape, lora.rank)), recurse=False
        )  # type: ignore
    return made
