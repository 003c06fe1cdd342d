"""Products with frozen weights, and how they are computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from qlab.nn.linear import having, is_stored_in, own_arrays, product, tied, weight_of
from qlab.ops.custom_gradient import with_gradient
from qlab.ops.matmul import onto


class Frozen(nn.Module):
    """A layer that is never trained, with its product made as told.

    Args:
        layer: linear or embedding, dense, quantized or packed.
        dtype: of an embedding's output, and so of the products after it; None leaves the weights'
            own.
        dequantize: whether to make the product from the dequantized weight instead of by MLX's
            quantized kernel.
        keep: whether the dense weight may live from forward to backward (right within a block that
            is computed again).
    """

    def __init__(
        self, layer: nn.Module, dtype: mx.Dtype | None, dequantize: bool, keep: bool = False
    ) -> None:
        super().__init__()
        self.layer = layer
        self._compute = dtype
        self._dequantize = dequantize
        self._keep = keep
        self._shared: mx.array | None = None
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        if self.embeds:
            y = self.layer(x)
            return y if self._compute is None else y.astype(self._compute)
        if not self._dequantize:
            return self.layer(x)
        y = self.as_linear(x)
        return y + self.layer["bias"] if "bias" in self.layer else y

    def as_linear(self, x: mx.array) -> mx.array:
        """Return x·Wᵀ, without bias."""
        if self._shared is not None:
            return x @ self._shared.T
        if not self._dequantize:
            return self.layer.as_linear(x)
        return x @ weight_of(self.layer, x.dtype).T if self._keep else product(self.layer, x)

    def adapted(self, x: mx.array, first: mx.array, second: mx.array, scale: float) -> mx.array:
        """Return x·Wᵀ + scale·(x·A)·B and the bias, the small product first, so that the large one
        adds it on its way.

        Args:
            x: ``(…, in)``.
            first: A, ``(in, rank)``, in x's dtype.
            second: B, ``(rank, out)``, in x's dtype.
            scale: of the small product.
        """
        if not self._dequantize and self._shared is None:
            return onto(self(x), scale * (x @ first), second)
        y = adapted_product(self.layer, x, first, second, scale, self._shared, self._keep)
        return y + self.layer["bias"] if "bias" in self.layer else y

    @contextmanager
    def once(self, after: mx.array) -> Iterator[None]:
        """Dequantize once, when ``after`` is there, for all products made within."""
        with self.lent(
            weight_of(tied(self.layer, after), after.dtype) if self._dequantize else None
        ):
            yield

    @contextmanager
    def lent(self, weight: mx.array | None) -> Iterator[None]:
        """Make all products within from this dense weight; None leaves it to the layer."""
        self._shared = weight
        try:
            yield
        finally:
            self._shared = None

    @property
    def embeds(self) -> bool:
        """Whether it looks tokens up."""
        return hasattr(self.layer, "as_linear")

    def worth(self, dtype: mx.Dtype) -> mx.array | None:
        """Return the dense weight, lazily, if products in ``dtype`` are to be made from one that is
        not stored so.
        """
        if not self._dequantize or is_stored_in(self.layer, dtype):
            return None
        return weight_of(self.layer, dtype)

    def keep(self) -> None:
        """Let the dense weight live from forward to backward from now on."""
        self._keep = True

    def dense(self, dtype: mx.Dtype | None = None) -> mx.array:
        """Return the weight as numbers."""
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
    shared: mx.array | None,
    keep: bool,
) -> mx.array:
    """Return x·Wᵀ + scale·(x·A)·B of a frozen layer, with a gradient that needs no addition of its
    own either.

    Every addition and the scale are part of a product: one by one they cost an H100 a tenth of a
    step.

    Args:
        layer: dense, one of MLX's quantized layers, or a packed one.
        x: ``(…, in)``; products are made in its dtype.
        first: A, ``(in, rank)``.
        second: B, ``(rank, out)``.
        scale: of the small product.
        shared: the dense weight, if there is one already.
        keep: whether the dense weight may live from forward to backward.
    """
    if shared is None and (keep or is_stored_in(layer, x.dtype)):
        shared = weight_of(layer, x.dtype)
    names, arrays = own_arrays(layer) if shared is None else ([], [shared])

    def weight(arrays: Sequence[mx.array], to: mx.array | None) -> mx.array:
        if shared is not None:
            return arrays[0]
        own = having(layer, names, arrays)
        return weight_of(own if to is None else tied(own, to), x.dtype)

    def times(rows: mx.array, factor: mx.array, first: mx.array) -> mx.array:
        # nothing times a row of A is added, for its shape: so the product itself is scaled
        return mx.addmm(first[:1], rows, factor, alpha=scale, beta=0.0)

    def forward(x: mx.array, first: mx.array, second: mx.array, *arrays: mx.array) -> mx.array:
        return mx.addmm(times(x, first, first) @ second, x, weight(arrays, None).T)

    def backward(
        slope: mx.array, x: mx.array, first: mx.array, second: mx.array, *arrays: mx.array
    ) -> list[mx.array]:
        thin = times(slope, second.T, first)
        by_x = mx.addmm(thin @ first.T, slope, weight(arrays, slope))
        return [by_x, x.T @ thin, times(x, first, first).T @ slope]

    rows = x.reshape(-1, x.shape[-1])
    return with_gradient(forward, backward, [rows, first, second], arrays).reshape(
        *x.shape[:-1], second.shape[-1]
    )


@dataclass(frozen=True)
class Compute:
    """How the frozen layers are computed.

    Attributes:
        dtype: of the activations; None leaves the model's own.
        dequantize: whether products are made from dequantized weights, or by MLX's quantized
            kernels.
    """

    dtype: mx.Dtype | None
    dequantize: bool
