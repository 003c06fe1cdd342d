"""Makes layers around a weight: packed or quantized ones, and dense ones in their place.

Used by whatever writes a model's layers anew: quantizing, fusing, opening and saving folders.
"""

from __future__ import annotations

import copy

import mlx.core as mx
import mlx.nn as nn

from qlab.core.config.quant import QuantConfig
from qlab.nn.experts import PackedExperts
from qlab.nn.kinds import layer_kind
from qlab.nn.linear import LayerKind, Packed, PackedEmbedding, PackedLinear, is_quantized

_PACKED: dict[LayerKind, type[Packed]] = {
    "linear": PackedLinear,
    "embedding": PackedEmbedding,
    "switch": PackedExperts,
}


def stored_layer(
    packed: dict[str, mx.array],
    config: QuantConfig,
    shape: tuple[int, ...],
    dtype: mx.Dtype,
    kind: LayerKind,
) -> nn.Module:
    """Return a layer around packed arrays: MLX's quantized class where it reads them, else qlab's.

    Args:
        packed: arrays by parameter name.
        config: how they are packed.
        shape: of the dense weight, ``(…, out, in)``.
        dtype: of the dense weight.
        kind: what the layer is; see ``layer_kind``.
    """
    mode = config.scheme.stock_mode
    if mode is None:
        return _PACKED[kind](packed, config, shape, dtype)
    layer = _empty(_quantized_class(kind))
    layer.group_size = config.group_size
    layer.bits = config.bits
    layer.mode = mode
    layer.biases = None
    for name, array in packed.items():
        layer[name] = array
    if kind == "embedding":
        layer.num_embeddings, layer.dims = shape
    if kind == "switch":
        layer.global_scale = None
    layer.freeze()
    return layer


def dense_layer(layer: nn.Module, weight: mx.array) -> nn.Module:
    """Return an unquantized layer with another weight, and with the bias of ``layer``.

    Args:
        layer: dense, quantized or packed; linear, embedding or the experts of a mixture.
        weight: ``(…, out, in)``.
    """
    if is_quantized(layer):
        dense = _empty(_dense_class(layer_kind(layer)))
        if "bias" in layer:
            dense.bias = layer.bias
    else:
        dense = copy.copy(layer)
    dense.weight = weight
    return dense


def _empty(kind: type[nn.Module]) -> nn.Module:
    """Return a module without arrays: its own constructor would draw random weights."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    return module


def _quantized_class(kind: LayerKind) -> type[nn.Module]:
    if kind == "linear":
        return nn.QuantizedLinear
    if kind == "embedding":
        return nn.QuantizedEmbedding
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear

    return QuantizedSwitchLinear


def _dense_class(kind: LayerKind) -> type[nn.Module]:
    if kind == "linear":
        return nn.Linear
    if kind == "embedding":
        return nn.Embedding
    from mlx_lm.models.switch_layers import SwitchLinear

    return SwitchLinear
