"""Frozen layers: products with weights that are never trained, and how these are computed.

``attach`` wraps the layers of a model in ``Frozen``; adapters add their low-rank product through
``Frozen.adapted``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qlab.nn.kinds import layer_kind
from qlab.nn.linear import arrays_of, depends_on, is_stored_in, product, weight_of, with_arrays
from qlab.ops.custom_gradient import with_gradient
from qlab.ops.matmul import add_product
from qlab.runtime.device import backend, wants_float32


@dataclass(frozen=True)
class Compute:
    """How the frozen layers of a model are computed.

    Attributes:
        dtype: of the activations; None leaves the model's own.
        dequantize: whether products are made from dequantized weights, or by MLX's quantized
            kernels.
    """

    dtype: mx.Dtype | None
    dequantize: bool


def usual_compute() -> Compute:
    """Return how frozen layers are computed where no trial has been made. Runs on the MLX thread.

    In float32 where 16-bit products are slow, and from dequantized weights except on Metal, whose
    quantized kernels are as fast.
    """
    dtype = mx.float32 if wants_float32() else None
    return Compute(dtype, dequantize=backend() != "metal")


class Frozen(nn.Module):
    """A layer that is never trained, and how its product is made.

    Example:
        >>> frozen = Frozen(nn.QuantizedLinear(64, 128), dtype=None, dequantize=True)
        >>> frozen(mx.ones((1, 5, 64))).shape
        (1, 5, 128)

    Args:
        layer: linear or embedding, dense, quantized or packed.
        dtype: of an embedding's output, and so of the products after it; None leaves the weights'
            own.
        dequantize: whether to make the product from the dequantized weight instead of by MLX's
            quantized kernel.
        keep: whether the dense weight may live from forward to backward pass (right within a block
            that is computed again).
    """

    layer: Any  # any class of MLX's, mlx-lm's or qlab's that ``layer_kind`` knows

    def __init__(
        self, layer: nn.Module, dtype: mx.Dtype | None, dequantize: bool, keep: bool = False
    ) -> None:
        super().__init__()
        self.layer = layer
        self._compute = dtype
        self._dequantize = dequantize
        self._keep = keep
        self._shared: mx.array | None = None  # the dense weight that using_dense lends
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        """Return the layer's output: ``(…, in)`` or ``(…)`` tokens → ``(…, out)``."""
        if self.embeds:
            y = self.layer(x)
            return y if self._compute is None else y.astype(self._compute)
        if not self._dequantize:
            return self.layer(x)
        return self._with_bias(self.as_linear(x))

    def as_linear(self, x: mx.array) -> mx.array:
        """Return x·Wᵀ, ``(…, in)`` → ``(…, out)``, without bias."""
        if self._shared is not None:
            return x @ self._shared.T
        if not self._dequantize:
            return self.layer.as_linear(x)
        if self._keep:
            return x @ weight_of(self.layer, x.dtype).T
        return product(self.layer, x)

    def adapted(self, x: mx.array, first: mx.array, second: mx.array, scale: float) -> mx.array:
        """Return x·Wᵀ + scale·(x·A)·B and the bias, ``(…, out)``.

        The small product is made first, so that the large one adds it on its way.

        Args:
            x: ``(…, in)``.
            first: A, ``(in, rank)``, in x's dtype.
            second: B, ``(rank, out)``, in x's dtype.
            scale: of the small product.
        """
        if not self._dequantize and self._shared is None:
            return add_product(self(x), scale * (x @ first), second)
        shared = self._shared
        if shared is None and (self._keep or is_stored_in(self.layer, x.dtype)):
            shared = weight_of(self.layer, x.dtype)
        return self._with_bias(adapted_product(self.layer, x, first, second, scale, shared))

    def _with_bias(self, y: mx.array) -> mx.array:
        return y + self.layer["bias"] if "bias" in self.layer else y

    @contextmanager
    def dequantized_once(self, after: mx.array) -> Iterator[None]:
        """Make all products within from one dense weight, which is made when ``after`` is there."""
        weight = None
        if self._dequantize:
            weight = weight_of(depends_on(self.layer, after), after.dtype)
        with self.using_dense(weight):
            yield

    @contextmanager
    def using_dense(self, weight: mx.array | None) -> Iterator[None]:
        """Make all products within from this dense weight ``(out, in)``; None changes nothing."""
        self._shared = weight
        try:
            yield
        finally:
            self._shared = None

    @property
    def embeds(self) -> bool:
        """Whether it looks tokens up."""
        return layer_kind(self.layer) == "embedding"

    def dense_if_needed(self, dtype: mx.Dtype) -> mx.array | None:
        """Return the dense weight, lazily, if products in ``dtype`` are to be made from it.

        Args:
            dtype: of the activations.

        Returns:
            ``(out, in)``; None if the layer computes by a kernel, or stores its weight so already.
        """
        if not self._dequantize or is_stored_in(self.layer, dtype):
            return None
        return weight_of(self.layer, dtype)

    def keep_dense(self) -> None:
        """Let the dense weight live from forward to backward pass from now on."""
        self._keep = True

    def dense(self, dtype: mx.Dtype | None = None) -> mx.array:
        """Return the dequantized weight, ``(…, out, in)``; see ``weight_of``."""
        return weight_of(self.layer, dtype)

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:  # models ask their layers for sizes, and some for the weight
            return getattr(super().__getattr__("layer"), name)


def adapted_product(
    layer: nn.Module,
    x: mx.array,
    first: mx.array,
    second: mx.array,
    scale: float,
    shared: mx.array | None = None,
) -> mx.array:
    """Return x·Wᵀ + scale·(x·A)·B of a frozen layer, ``(…, out)``, without bias.

    Every addition and the scale are part of a product (``mx.addmm``), in the gradient too: made one
    by one they cost an H100 a tenth of a step.

    Args:
        layer: dense, one of MLX's quantized layers, or a packed one.
        x: ``(…, in)``; products are made in its dtype.
        first: A, ``(in, rank)``.
        second: B, ``(rank, out)``.
        scale: of the small product.
        shared: the dense weight ``(out, in)``, if it may live from forward to backward pass; else
            it is made in both.
    """
    names, arrays = arrays_of(layer)
    if shared is not None:
        names = []
        arrays = [shared]

    def weight(arrays: Sequence[mx.array], after: mx.array | None = None) -> mx.array:
        if shared is not None:
            return arrays[0]
        same = with_arrays(layer, names, arrays)
        if after is not None:
            same = depends_on(same, after)
        return weight_of(same, x.dtype)

    def scaled(rows: mx.array, factor: mx.array, first: mx.array) -> mx.array:
        # addmm scales a product only while it adds something: so a row of A is added, for its
        # shape (1, rank), times zero
        return mx.addmm(first[:1], rows, factor, alpha=scale, beta=0.0)

    def forward(x: mx.array, first: mx.array, second: mx.array, *arrays: mx.array) -> mx.array:
        low_rank = scaled(x, first, first) @ second  # (rows, rank) @ (rank, out)
        return mx.addmm(low_rank, x, weight(arrays).T)

    def backward(
        slope: mx.array, x: mx.array, first: mx.array, second: mx.array, *arrays: mx.array
    ) -> list[mx.array]:
        thin = scaled(slope, second.T, first)  # (rows, out) @ (out, rank)
        low_rank = thin @ first.T  # (rows, in)
        by_x = mx.addmm(low_rank, slope, weight(arrays, after=slope))
        by_first = x.T @ thin  # (in, rank)
        by_second = scaled(x, first, first).T @ slope  # (rank, out)
        return [by_x, by_first, by_second]

    rows = x.reshape(-1, x.shape[-1])  # addmm wants matrices
    y = with_gradient(forward, backward, [rows, first, second], arrays)
    return y.reshape(*x.shape[:-1], second.shape[-1])
