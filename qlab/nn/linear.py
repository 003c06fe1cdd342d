"""The dense weight of a layer, whatever its storage, and layers for formats MLX cannot read itself.

Everything that reads or multiplies by a stored weight comes through ``weight_of`` and ``product``.
A packed layer dequantizes for its forward pass, and again for its backward pass, instead of keeping
the dense weight in between.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, TypeVar

import mlx.core as mx
import mlx.nn as nn

from qlab.core.config.quant import QuantConfig
from qlab.ops.custom_gradient import with_gradient
from qlab.ops.unpack import affine

LayerKind = Literal["linear", "embedding", "switch"]
Layer = TypeVar("Layer", bound=nn.Module)


class Packed(nn.Module):
    """A layer that holds its weight as the packed arrays of a scheme.

    Args:
        packed: arrays by the names that the scheme gives them.
        config: how they are packed.
        shape: of the dense weight, ``(…, out, in)``.
        dtype: of the weight before it was packed.

    Attributes:
        kind: what kind of layer it is; see ``nn.kinds.layer_kind``.
    """

    kind: ClassVar[LayerKind]

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
        """Shape of the dense weight, ``(…, out, in)``."""
        return self._shape

    @property
    def dtype(self) -> mx.Dtype:
        """Dtype that the weight had before it was packed."""
        return self._dtype

    def dense(self, dtype: mx.Dtype | None = None) -> mx.array:
        """Return the dequantized weight, ``(…, out, in)``, lazily.

        Args:
            dtype: to return; None means the weight's own.
        """
        return self.config.scheme.dequantize(self.packed, self.config, dtype or self._dtype)

    def product(self, x: mx.array) -> mx.array:
        """Return x·Ŵᵀ, ``(…, out)``; see ``product``."""
        return product(self, x)

    def _extra_repr(self) -> str:
        return f"{self._shape}, {self.config.label}"


class PackedLinear(Packed):
    """A linear layer over any scheme on the shelf."""

    kind = "linear"

    def __call__(self, x: mx.array) -> mx.array:
        """Return x·Ŵᵀ and the bias: ``(…, in)`` → ``(…, out)``."""
        y = self.product(x)
        return y + self["bias"] if "bias" in self else y


class PackedEmbedding(Packed):
    """An embedding over any scheme on the shelf, also usable as tied output head."""

    kind = "embedding"

    def __call__(self, tokens: mx.array) -> mx.array:
        """Look tokens up: ``(…)`` integers → ``(…, width)``; only their rows are dequantized."""
        scheme = self.config.scheme
        return scheme.dequantize(scheme.take(self.packed, tokens), self.config, self._dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """Multiply by the transposed embedding: ``(…, width)`` → ``(…, tokens)``."""
        return self.product(x)


def product(layer: Any, x: mx.array) -> mx.array:
    """Return x·Wᵀ of a frozen layer, without bias: ``(…, in)`` → ``(…, out)``.

    The gradient by x dequantizes the weight again; the weight gets no gradient.

    Args:
        layer: dense, one of MLX's quantized layers, or a packed one.
        x: ``(…, in)``; the product is made in its dtype.
    """
    if is_stored_in(layer, x.dtype):
        return x @ layer.weight.T

    names, arrays = arrays_of(layer)

    def forward(x: mx.array, *arrays: mx.array) -> mx.array:
        weight = weight_of(with_arrays(layer, names, arrays), x.dtype)  # (out, in)
        return x @ weight.T

    def backward(slope: mx.array, _: mx.array, *arrays: mx.array) -> list[mx.array]:
        # The weight depends on the slope: otherwise compilation would merge this dequantization
        # with the forward one, and keep the dense weight alive from forward to backward.
        later = depends_on(with_arrays(layer, names, arrays), slope)
        return [slope @ weight_of(later, slope.dtype)]  # (…, out) @ (out, in)

    return with_gradient(forward, backward, [x], arrays)


def depends_on(layer: Layer, to: mx.array) -> Layer:
    """Return a copy of a layer whose arrays are read only once ``to`` is computed."""
    names, arrays = arrays_of(layer)
    return with_arrays(layer, names, mx.depends(arrays, [to]))


def arrays_of(layer: nn.Module) -> tuple[list[str], list[mx.array]]:
    """Return the names and the values of the arrays that a layer holds itself."""
    names = []
    arrays = []
    for name, value in layer.items():
        if isinstance(value, mx.array):
            names.append(name)
            arrays.append(value)
    return names, arrays


def with_arrays(layer: Layer, names: Sequence[str], arrays: Sequence[mx.array]) -> Layer:
    """Return a copy of a layer that holds other arrays; the layer itself is not changed."""
    changed = copy.copy(layer)
    for name, array in zip(names, arrays, strict=True):
        changed[name] = array
    return changed


def weight_of(layer: Any, dtype: mx.Dtype | None = None) -> mx.array:
    """Return a layer's dequantized weight, lazily, whatever its storage.

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
    scales_dtype = floating_dtype(layer.scales)
    dtype = dtype or scales_dtype
    biases = layer.get("biases")
    # In float32 nothing is rounded to the scales' dtype on the way, as in MLX's quantized products.
    if layer.mode == "affine" and dtype in (scales_dtype, mx.float32):
        arrays = [layer.scales.astype(dtype), biases.astype(dtype)]
        return affine(layer.weight, arrays, layer.bits, layer.group_size, dtype)
    return mx.dequantize(
        layer.weight, layer.scales, biases, layer.group_size, layer.bits, layer.mode, dtype=dtype
    )


def floating_dtype(scales: mx.array) -> mx.Dtype:
    """Return the dtype that dequantizing gives: the scales', bfloat16 where these are codes."""
    return scales.dtype if mx.issubdtype(scales.dtype, mx.floating) else mx.bfloat16


def is_quantized(layer: Any) -> bool:
    """Whether a layer's weight is stored in codes."""
    return isinstance(layer, Packed) or "scales" in layer


def is_stored_in(layer: Any, dtype: mx.Dtype) -> bool:
    """Whether a layer's weight is there in this dtype and need not be made."""
    return not is_quantized(layer) and layer.weight.dtype == dtype
