"""The experts of a mixture, frozen: one weight ``(experts, out, in)``, of which tokens take a few.

Called as mlx-lm's ``SwitchLinear`` is, with the expert of every row.
"""

from __future__ import annotations

import mlx.core as mx

from qlab.nn.frozen import Frozen
from qlab.nn.linear import Packed, arrays_of, depends_on, with_arrays
from qlab.ops.custom_gradient import with_gradient
from qlab.ops.matmul import routed


class PackedExperts(Packed):
    """Experts over any scheme on the shelf; called as mlx-lm's ``SwitchLinear`` is."""

    kind = "switch"

    def __call__(
        self, x: mx.array, indices: mx.array, sorted_indices: bool = False, keep: bool = False
    ) -> mx.array:
        """Return x·Ŵᵀ and the bias, every row of x with the weight of its own expert.

        Args:
            x: ``(…, 1, in)``; the product is made in its dtype.
            indices: ``(…)``, the expert of every row; a row of x may serve several.
            sorted_indices: whether they ascend.
            keep: whether the dense weight may live from forward to backward pass, instead of being
                made again.

        Returns:
            ``(…, 1, out)``.
        """
        if keep:
            y = routed(x, self.dense(x.dtype), indices, sorted_indices)
        else:
            y = self._product(x, indices, sorted_indices)
        if "bias" not in self:
            return y
        bias = self["bias"][indices]  # (…, out)
        return y + bias[..., None, :]

    def _product(self, x: mx.array, indices: mx.array, sorted_indices: bool) -> mx.array:
        names, arrays = arrays_of(self)

        def dense(arrays: tuple[mx.array, ...], after: mx.array | None = None) -> mx.array:
            same = with_arrays(self, names, arrays)
            later = same if after is None else depends_on(same, after)
            return later.dense(x.dtype)

        def forward(x: mx.array, indices: mx.array, *arrays: mx.array) -> mx.array:
            return routed(x, dense(arrays), indices, sorted_indices)

        def backward(
            slope: mx.array, x: mx.array, indices: mx.array, *arrays: mx.array
        ) -> list[mx.array]:
            weight = dense(arrays, after=slope)  # dequantized again; see nn.linear.product

            def product(x: mx.array) -> list[mx.array]:
                return [routed(x, weight, indices, sorted_indices)]

            _, gradients = mx.vjp(product, [x], [slope])  # of a gather: left to MLX
            return gradients

        return with_gradient(forward, backward, [x], [indices, *arrays])


class FrozenExperts(Frozen):
    """Experts that are never trained.

    MLX's own kernels compute the formats that they read; the others are dequantized.
    """

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """Return each row's product with its expert; see ``PackedExperts``."""
        if isinstance(self.layer, PackedExperts):
            return self.layer(x, indices, sorted_indices, keep=self._keep)
        return self.layer(x, indices, sorted_indices=sorted_indices)
