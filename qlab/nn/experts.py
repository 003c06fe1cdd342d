"""The experts of a mixture, frozen.

One weight ``(experts, out, in)`` in any storage, of which each token takes a few.

Knows no model and no adapter.
"""

from __future__ import annotations

import mlx.core as mx

from qlab.nn.frozen import Frozen
from qlab.nn.linear import Packed, having, own_arrays, tied
from qlab.ops.custom_gradient import with_gradient
from qlab.ops.matmul import routed


class PackedExperts(Packed):
    """Experts over any scheme on the shelf; called as mlx-lm's ``SwitchLinear`` is."""

    def __call__(
        self, x: mx.array, indices: mx.array, sorted_indices: bool = False, keep: bool = False
    ) -> mx.array:
        """Return x·Ŵᵀ, every row of x with the weight of its own expert.

        Args:
            x: ``(…, 1, in)``; the product is made in its dtype.
            indices: ``(…)``, the expert of every row; a row of x may serve several.
            sorted_indices: whether they ascend.
            keep: whether the dense weight may live from forward to backward, instead of being made
                again.
        """
        y = (
            self._product(x, indices, sorted_indices)
            if not keep
            else routed(x, self.dense(x.dtype), indices, sorted_indices)
        )
        return y + self["bias"][indices][..., None, :] if "bias" in self else y

    def _product(self, x: mx.array, indices: mx.array, sorted_indices: bool) -> mx.array:
        names, arrays = own_arrays(self)

        def forward(x: mx.array, indices: mx.array, *arrays: mx.array) -> mx.array:
            return routed(x, having(self, names, arrays).dense(x.dtype), indices, sorted_indices)

        def backward(
            slope: mx.array, x: mx.array, indices: mx.array, *arrays: mx.array
        ) -> list[mx.array]:
            dense = tied(having(self, names, arrays), slope).dense(x.dtype)
            return mx.vjp(lambda x: [routed(x, dense, indices, sorted_indices)], [x], [slope])[1]

        return with_gradient(forward, backward, [x], [indices, *arrays])


class FrozenExperts(Frozen):
    """Experts that are never trained.

    MLX's own kernels read what they can, the others are dequantized.
    """

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        if isinstance(self.layer, PackedExperts):
            return self.layer(x, indices, sorted_indices, keep=self._keep)
        return self.layer(x, indices, sorted_indices=sorted_indices)
