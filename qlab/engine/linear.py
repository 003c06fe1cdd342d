"""The weight of a layer as numbers, and layers for formats that MLX's own kernels do not read.

A packed layer's product dequantizes, and its backward pass dequantizes again instead of keeping the dense weight.
Knows no model.
"""

from __future__ import annotations

import copy

import mlx.core as mx
import mlx.nn as nn

from qlab.core.config import QuantConfig


class _Packed(nn.Module):
    """Packed arrays of a scheme, under the names that the scheme gives them, and how to read them."""

    def __init__(self, packed: dict[str, mx.array], config: QuantConfig, shape: tuple[int, ...], dtype: mx.Dtype) -> None:
        super().__init__()
        for name, array in packed.items():
            self[name] = array
        self._names, self.config, self._shape, self._dtype = tuple(packed), config, shape, dtype
        self.freeze()

    @property
    def packed(self) -> dict[str, mx.array]:
        """The stored arrays by name."""
        return {name: self[name] for name in self._names}

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight as numbers."""
        return self._shape

    @property
    def dtype(self) -> mx.Dtype:
        """Dtype that the weight had before it was packed."""
        return self._dtype

    def dense(self, dtype: mx.Dtype | None = None) -> mx.array:
        """Return the weight as numbers, in its original dtype unless told."""
        return self.config.scheme.dequantize(self.packed, self.config, dtype or self._dtype)

    def product(self, x: mx.array) -> mx.array:
        """Return x·Ŵᵀ. The gradient of x is recomputed from the packed weight, and the weight gets none."""

        @mx.custom_function
        def apply(x: mx.array) -> mx.array:
            return x @ self.dense(x.dtype).T

        @apply.vjp
        def backward(primals, cotangent, _):
            # tied to the cotangent, or compile would merge this dequantization with the forward one and keep it alive
            names, arrays = zip(*self.packed.items(), strict=True)
            tied = mx.depends(list(arrays), [cotangent])
            packed = dict(zip(names, tied, strict=True))
            return cotangent @ self.config.scheme.dequantize(packed, self.config, cotangent.dtype)

        return apply(x)

    def _extra_repr(self) -> str:
        return f"{self._shape}, {self.config.label}"


class PackedLinear(_Packed):
    """A linear layer over any scheme on the shelf."""

    def __call__(self, x: mx.array) -> mx.array:
        y = self.product(x)
        return y + self["bias"] if "bias" in self else y


class PackedEmbedding(_Packed):
    """An embedding over any scheme on the shelf, also usable as tied output head."""

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.dense()[tokens]

    def as_linear(self, x: mx.array) -> mx.array:
        """Multiply by the transposed embedding."""
        return self.product(x)


def weight_of(layer: nn.Module, dtype: mx.Dtype | None = None) -> mx.array:
    """Return a layer's weight as numbers, lazily, whatever its storage.

    Args:
        layer: dense, one of MLX's quantized layers, or a packed one.
        dtype: to return; None means the weight's own (its scales' if it is stored quantized).

    Returns:
        ``(…, out, in)``.
    """
    if isinstance(layer, _Packed):
        return layer.dense(dtype)
    if "scales" not in layer:
        return layer.weight if dtype is None else layer.weight.astype(dtype)
    own = layer.scales.dtype if mx.issubdtype(layer.scales.dtype, mx.floating) else mx.bfloat16
    return mx.dequantize(
        layer.weight, layer.scales, layer.get("biases"), layer.group_size, layer.bits, layer.mode, dtype=dtype or own
    )


def is_quantized(layer: nn.Module) -> bool:
    """Whether a layer's weight is stored in codes."""
    return isinstance(layer, _Packed) or "scales" in layer


def dense_layer(layer: nn.Module, weight: mx.array) -> nn.Module:
    """Return an unquantized layer with this weight, and with the layer's own bias.

    Args:
        layer: dense, quantized or packed; linear, embedding or the experts of a mixture.
        weight: ``(…, out, in)``.
    """
    if not is_quantized(layer):
        made = copy.copy(layer)
    else:
        made = _dense_class(layer).__new__(_dense_class(layer))
        nn.Module.__init__(made)
        if "bias" in layer:
            made.bias = layer.bias
    made.weight = weight
    return made


def _dense_class(layer: nn.Module) -> type[nn.Module]:
    if hasattr(layer, "as_linear"):
        return nn.Embedding
    if isinstance(layer, (PackedLinear, nn.QuantizedLinear)):
        return nn.Linear
    from mlx_lm.models.switch_layers import SwitchLinear

    return SwitchLinear
