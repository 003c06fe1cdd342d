"""The weight of a layer as numbers, and layers for formats that MLX's own kernels do not read.

A packed layer's product dequantizes, and its backward pass dequantizes again instead of keeping the
dense weight. Knows no model.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from qlab.core.config.quant import QuantConfig
from qlab.ops.custom_gradient import with_gradient
from qlab.ops.unpack import affine


class Packed(nn.Module):
    """Packed arrays of a scheme, under the names that the scheme gives them, and how to read them."""

    def __init__(
        self,
        packed: dict[str, mx.array],
        config: QuantConfig,
        shape: tuple[int, ...],
        dtype: mx.Dtype,
    ) -> None:
        super().__init__()
        for name, array in packed.items():
            self[name] = array
        self._names = tuple(packed)
        self.config = config
        self._shape = shape
        self._dtype = dtype
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
        """Return x·Ŵᵀ.

        The gradient of x is recomputed from the packed weight, and the weight gets none.
        """
        return product(self, x)

    def _extra_repr(self) -> str:
        return f"{self._shape}, {self.config.label}"


class PackedLinear(Packed):
    """A linear layer over any scheme on the shelf."""

    def __call__(self, x: mx.array) -> mx.array:
        y = self.product(x)
        return y + self["bias"] if "bias" in self else y


class PackedEmbedding(Packed):
    """An embedding over any scheme on the shelf, also usable as tied output head."""

    def __call__(self, tokens: mx.array) -> mx.array:
        scheme = self.config.scheme
        return scheme.dequantize(scheme.take(self.packed, tokens), self.config, self._dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """Multiply by the transposed embedding."""
        return self.product(x)


def product(layer: nn.Module, x: mx.array) -> mx.array:
    """Return x·Wᵀ of a frozen layer.

    The backward pass dequantizes again instead of keeping the dense weight.

    Args:
        layer: dense, one of MLX's quantized layers, or a packed one.
        x: ``(…, in)``; the product is made in its dtype.
    """
    if is_stored_in(layer, x.dtype):
        return x @ layer.weight.T

    names, arrays = own_arrays(layer)

    def forward(x: mx.array, *arrays: mx.array) -> mx.array:
        return x @ weight_of(having(layer, names, arrays), x.dtype).T

    def backward(slope: mx.array, _: mx.array, *arrays: mx.array) -> list[mx.array]:
        # tied to the slope, or compile would merge this dequantization with the forward one and
        # keep it alive
        return [slope @ weight_of(tied(having(layer, names, arrays), slope), slope.dtype)]

    return with_gradient(forward, backward, [x], arrays)


def tied(layer: nn.Module, to: mx.array) -> nn.Module:
    """Return a layer whose arrays are read only once ``to`` is there."""
    names, arrays = own_arrays(layer)
    return having(layer, names, mx.depends(arrays, [to]))


def own_arrays(layer: nn.Module) -> tuple[list[str], list[mx.array]]:
    """Return a layer's own arrays and their names."""
    found = {name: value for name, value in layer.items() if isinstance(value, mx.array)}
    return list(found), list(found.values())


def having(layer: nn.Module, names: Sequence[str], arrays: Sequence[mx.array]) -> nn.Module:
    """Return a layer with other arrays."""
    made = copy.copy(layer)
    for name, array in zip(names, arrays, strict=True):
        made[name] = array
    return made


def weight_of(layer: nn.Module, dtype: mx.Dtype | None = None) -> mx.array:
    """Return a layer's weight as numbers, lazily, whatever its storage.

    Args:
        layer: dense, one of MLX's quantized layers, or a packed one.
        dtype: to return; None means the weight's own (its scales' if it is stored quantized).

    Returns:
        ``(…, out, in)``.
    """
    if isinstance(layer, Packed):
        return layer.dense(dtype)
    if "scales" not in layer:
        return layer.weight if dtype is None else layer.weight.astype(dtype)
    own = layer.scales.dtype if mx.issubdtype(layer.scales.dtype, mx.floating) else mx.bfloat16
    dtype = dtype or own
    biases = layer.get("biases")
    # in float32 nothing is rounded to the scales' dtype on the way, as in MLX's products with codes
    if layer.mode == "affine" and dtype in (own, mx.float32):
        arrays = [array.astype(dtype) for array in (layer.scales, biases)]
        return affine(layer.weight, arrays, layer.bits, layer.group_size, dtype)
    return mx.dequantize(
        layer.weight, layer.scales, biases, layer.group_size, layer.bits, layer.mode, dtype=dtype
    )


def is_quantized(layer: nn.Module) -> bool:
    """Whether a layer's weight is stored in codes."""
    return isinstance(layer, Packed) or "scales" in layer


def is_stored_in(layer: nn.Module, dtype: mx.Dtype) -> bool:
    """Whether a layer's weight is there as numbers of this dtype, so that none need be made."""
    return not is_quantized(layer) and layer.weight.dtype == dtype


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
