"""DoRA: ``W = m · (W0 + scale·ΔW) / ‖W0 + scale·ΔW‖``, the norm taken row by row: direction and magnitude learned apart.

Source: Liu et al. 2024 (arXiv:2402.09353), equation 5; the norm gets no gradient (section 4.3). Names and shapes as mlx-lm
stores them, ``m`` ``(out,)``. No weight is ever built: ‖W0 + s·BA‖² = ‖W0‖² + 2s·⟨W0, BA⟩ + s²·‖BA‖² needs the product of
the base with as many rows as the rank, so every storage of the base serves, and nothing dense is kept for the way back.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qlab.core.adapter import AdapterKind
from qlab.core.training import LoRAConfig


class DoRALayer(nn.Module):
    """A frozen linear layer, a low-rank change of its directions, and the length of every row."""

    def __init__(self, base: Any, config: LoRAConfig, outer: int, inner: int) -> None:
        super().__init__()
        dtype = getattr(mx, config.dtype)
        bound = 1 / math.sqrt(outer)
        self.base, self.scale = base, config.scale
        self.lora_a = mx.random.uniform(-bound, bound, (outer, config.rank)).astype(dtype)
        self.lora_b = mx.zeros((config.rank, inner), dtype)
        self.base_square = mx.square(base.dense(mx.float32)).sum(-1)
        self.m = mx.sqrt(self.base_square).astype(dtype)
        self.freeze(recurse=False, keys=["base_square"])
        self._dropout = config.dropout
        if config.dropout:  # set anew for every step; the way back must draw the same mask again
            self.dropout_key = mx.random.key(0)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.base(x)
        z = (self.dropped(x) @ self.lora_a.astype(x.dtype)) @ self.lora_b.astype(x.dtype)
        a, b = (mx.stop_gradient(f.astype(mx.float32)) for f in (self.lora_a, self.lora_b))
        crossed = self._without_bias(self.base(a.T)) * b  # (rank, out)
        gain = self._gain(crossed.sum(0), ((a.T @ a) @ b * b).sum(0)).astype(x.dtype)
        # written so that a gain of 1 leaves the base's own output
        return y + (gain - 1) * self._without_bias(y) + gain * (self.scale * z)

    def dropped(self, x: mx.array) -> mx.array:
        """Set a share of the numbers to zero while training, and make up for it in the others."""
        if not self._dropout or not self.training:
            return x
        return x * mx.random.bernoulli(1 - self._dropout, x.shape, self.dropout_key) * (1 / (1 - self._dropout))

    def _gain(self, crossed: mx.array, squared: mx.array) -> mx.array:
        """M divided by the rows' norms, from ⟨W0, BA⟩ and ‖BA‖² of every row, float32."""
        square = self.base_square + 2 * self.scale * crossed + self.scale**2 * squared
        return self.m.astype(mx.float32) / mx.sqrt(mx.stop_gradient(mx.maximum(square, _TINY)))

    def _without_bias(self, y: mx.array) -> mx.array:
        layer = self.base.layer
        return y - layer.bias.astype(y.dtype) if "bias" in layer else y

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # models ask their layers for sizes, and some for the weight
            return getattr(super().__getattr__("base"), name)


class DoRAEmbedding(DoRALayer):
    """The same on an embedding, as look-up and as tied output head."""

    def __call__(self, tokens: mx.array) -> mx.array:
        y = self.base(tokens)
        rows, b = self.lora_a[tokens].astype(y.dtype), self.lora_b.astype(y.dtype)
        z = self.scale * (rows @ b)
        square = mx.square((y + z).astype(mx.float32)).sum(-1)
        start = mx.square(y.astype(mx.float32)).sum(-1)
        # measured from what the base says here, so that rounding of its output is no change of length
        square = self.base_square[tokens] + (square - start)
        norm = mx.sqrt(mx.stop_gradient(mx.maximum(square, _TINY)))
        gain = (self.m[tokens].astype(mx.float32) / norm)[..., None].astype(y.dtype)
        return y + (gain - 1) * y + gain * self.dropped(z)

    def as_linear(self, x: mx.array) -> mx.array:
        """Multiply by the transposed embedding."""
        y = self.base.as_linear(x)
        z = (self.dropped(x) @ self.lora_b.T.astype(x.dtype)) @ self.lora_a.T.astype(x.dtype)
        a, b = (mx.stop_gradient(f.astype(mx.float32)) for f in (self.lora_a, self.lora_b))
        crossed = self.base.as_linear(b) * a.T  # (rank, tokens)
        gain = self._gain(crossed.sum(0), (a @ (b @ b.T) * a).sum(-1)).astype(x.dtype)
        return y + (gain - 1) * y + gain * (self.scale * z)


class DoRA(AdapterKind):
    """Weight-decomposed low-rank adapters."""

    name = "dora"
    title = "DoRA: low-rank directions, and the length of every row"
    adapts = ("linear", "embedding")

    def shapes(self, shape: tuple[int, ...], rank: int, kind: str = "linear") -> dict[str, tuple[int, ...]]:
        outer, inner = shape if kind == "embedding" else shape[::-1]
        return {"lora_a": (outer, rank), "lora_b": (rank, inner), "m": (shape[-2],)}

    def make(self, base: Any, shape: tuple[int, ...], config: LoRAConfig) -> Any:
        if hasattr(base.layer, "as_linear"):
            return DoRAEmbedding(base, config, *shape)
        return DoRALayer(base, config, *shape[::-1])

    def compensated(self, outer: Any, inner: Any, norms: Any) -> dict[str, Any]:
        return {"lora_a": outer, "lora_b": inner, "m": norms}


_TINY = 1e-20  # a row of zeros has no direction
SHELF = (DoRA(),)
