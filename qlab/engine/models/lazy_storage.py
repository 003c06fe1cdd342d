"""Models stored under a plan without computing anything."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from qlab.core.config.quant import QuantConfig
from qlab.engine.models.surgery import map_layers
from qlab.nn.linear import PackedEmbedding, PackedLinear, weight_of
from qlab.nn.stored import stored_layer
from qlab.runtime.device import backend

_UNREADABLE = {
    "nvfp4",
    "nvfp4_plain",
    "mxfp8",
}  # the CPU's dequantization has a primitive that cannot be exported (FromFP8)


def stored(module: nn.Module, configs: dict[str, QuantConfig]) -> nn.Module:
    """Return a twin of a model, to be read and never run, whose layers are stored under configs.

    Nothing is computed.

    Args:
        module: the model; its own weights may be lazy.
        configs: by path.
    """

    def make(path: str, layer: nn.Module) -> nn.Module:
        config = configs[path]
        weight = weight_of(layer)
        dtype = str(weight.dtype).removeprefix("mlx.core.")
        layout = config.scheme.layout(weight.shape, config, dtype)
        packed = {
            name: mx.zeros(shape, getattr(mx, kind)) for name, (shape, kind) in layout.items()
        }
        kind = (
            "embedding"
            if hasattr(layer, "as_linear")
            else "linear"
            if weight.ndim == 2
            else "switch"
        )
        if config.mode in _UNREADABLE and kind != "switch" and backend() == "cpu":
            made: nn.Module = (_ReadableEmbedding if kind == "embedding" else _ReadableLinear)(
                packed, config, weight.shape, weight.dtype
            )
        else:
            made = stored_layer(packed, config, weight.shape, weight.dtype, kind)
        if "bias" in layer:
            made.bias = layer.bias
        return made

    return map_layers(module, list(configs), make)


class _ReadableLinear(PackedLinear):
    """A layer whose dequantization makes the same arrays as MLX's, without the primitive that
    cannot be read.
    """

    def dense(self, dtype: mx.Dtype | None = None) -> mx.array:
        return _numbers(self.packed, self.config, dtype or self._dtype)


class _ReadableEmbedding(PackedEmbedding):
    def __call__(self, tokens: mx.array) -> mx.array:
        dtype = (
            mx.bfloat16 if self.config.scheme.stock_mode else self._dtype
        )  # MLX's own layer gives bfloat16
        return _numbers(self.config.scheme.take(self.packed, tokens), self.config, dtype)

    dense = _ReadableLinear.dense


def _numbers(packed: dict[str, mx.array], config: QuantConfig, dtype: mx.Dtype) -> mx.array:
    """Arrays of the sizes that ``mx.dequantize`` makes on the CPU (``mlx/ops.cpp``).

    The values mean nothing.
    """
    codes = packed["weight"]
    scales = packed["scales"]
    group = config.group_size
    if config.bits == 8:
        values = codes.view(mx.uint8).astype(dtype).reshape(-1, group)
        factors = mx.power(
            mx.array(2.0, dtype), scales.reshape(-1, 1).astype(dtype) - mx.array(127.0, dtype)
        )
    else:
        table = mx.zeros(16, dtype)
        bytes_ = codes.reshape(-1, 4).view(mx.int8)
        halves = [
            table[(bytes_ & 15).astype(mx.int8)][..., None],
            table[(bytes_ >> 4).astype(mx.int8)][..., None],
        ]
        values = mx.concatenate(halves, -1).reshape(-1, group)
        factors = scales.reshape(-1, 1).astype(dtype)
    dense = (values * factors).reshape(*codes.shape[:-1], -1)
    return (
        dense * (packed["global_scale"].astype(dtype) / 2688.0)
        if "global_scale" in packed
        else dense
    )
