"""Layers that hold their weight in a storage format."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from qlab.core.config.quant import QuantConfig
from qlab.nn.experts import PackedExperts
from qlab.nn.linear import PackedEmbedding, PackedLinear


def _class_of(layer: nn.Module) -> str:
    if hasattr(layer, "as_linear"):
        return "embedding"
    return (
        "switch"
        if isinstance(layer, PackedExperts) or "Switch" in type(layer).__name__
        else "linear"
    )


def stored_layer(
    packed: dict[str, mx.array],
    config: QuantConfig,
    shape: tuple[int, ...],
    dtype: mx.Dtype,
    kind: str,
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

    kinds = {
        "linear": nn.QuantizedLinear,
        "embedding": nn.QuantizedEmbedding,
        "switch": QuantizedSwitchLinear,
    }
    made = kinds[kind].__new__(
        kinds[kind]
    )  # their own constructors would draw and quantize random weights
    nn.Module.__init__(made)
    made.group_size = config.group_size
    made.bits = config.bits
    made.mode = mode
    made.biases = None
    for name, value in packed.items():
        made[name] = value
    if kind == "embedding":
        made.num_embeddings, made.dims = shape
    if kind == "switch":
        made.global_scale = None
    made.freeze()
    return made
