"""Models stored under a plan without computing anything, to be read by a memory estimate."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from qlab.core.config.quant import QuantConfig
from qlab.core.config.spec import ModelSpec
from qlab.engine.models.surgery import map_layers
from qlab.nn.experts import PackedExperts
from qlab.nn.kinds import layer_kind
from qlab.nn.linear import LayerKind, Packed, PackedEmbedding, PackedLinear, weight_of
from qlab.nn.stored import stored_layer
from qlab.runtime.device import backend


def stored(module: nn.Module, configs: dict[str, QuantConfig]) -> nn.Module:
    """Return a twin of a model whose layers are stored under configs; nothing is computed.

    Its weights are lazy zeros of the right shapes: the model is to be read, never run.

    Args:
        module: the model; its own weights may be lazy.
        configs: by path of the layer.
    """

    def make(path: str, layer: nn.Module) -> nn.Module:
        config = configs[path]
        weight = weight_of(layer)
        dtype = str(weight.dtype).removeprefix("mlx.core.")
        layout = config.scheme.layout(weight.shape, config, dtype)
        packed = {
            name: mx.zeros(shape, getattr(mx, kind)) for name, (shape, kind) in layout.items()
        }
        made = _layer(packed, config, weight, layer_kind(layer))
        if "bias" in layer:
            made.bias = layer.bias
        return made

    return map_layers(module, list(configs), make)


def readable(module: nn.Module, spec: ModelSpec) -> nn.Module:
    """Return a twin of a model whose operations can be exported as a graph; nothing is computed.

    Layers that came quantized by a scheme that cannot be read on this back end are replaced, as
    ``stored`` does for layers that are to be quantized.

    Args:
        module: the model.
        spec: its layers.
    """
    unreadable = {
        layer.path: layer.storage
        for layer in spec.layers
        if layer.storage is not None and backend() in layer.storage.scheme.unreadable_on
    }
    return stored(module, unreadable)


def _layer(
    packed: dict[str, mx.array], config: QuantConfig, weight: mx.array, kind: LayerKind
) -> nn.Module:
    """Return a layer around packed arrays whose operations can be exported as a graph."""
    kinds: dict[LayerKind, type[Packed]] = {
        "linear": _ReadableLinear,
        "embedding": _ReadableEmbedding,
    }
    scheme = config.scheme
    if scheme.stock_mode is None:  # MLX's own experts are one operation, which can be exported
        kinds["switch"] = _ReadableExperts
    if backend() in scheme.unreadable_on and kind in kinds:
        return kinds[kind](packed, config, weight.shape, weight.dtype)
    return stored_layer(packed, config, weight.shape, weight.dtype, kind)


class _ReadableLinear(PackedLinear):
    """A layer whose dequantization can be exported as a graph, with arrays of the same sizes."""

    def dense(self, dtype: mx.Dtype | None = None) -> mx.array:
        scheme = self.config.scheme
        return scheme.dequantize_readable(self.packed, self.config, dtype or self._dtype)


class _ReadableEmbedding(PackedEmbedding):
    """The same for an embedding."""

    def __call__(self, tokens: mx.array) -> mx.array:
        scheme = self.config.scheme
        # MLX's own quantized embedding gives bfloat16
        dtype = mx.bfloat16 if scheme.stock_mode else self._dtype
        return scheme.dequantize_readable(scheme.take(self.packed, tokens), self.config, dtype)

    dense = _ReadableLinear.dense


class _ReadableExperts(PackedExperts):
    """The same for the experts of a mixture."""

    dense = _ReadableLinear.dense
