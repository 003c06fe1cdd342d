"""LoRA: ``y = base(x) + scale · (x·A)·B``, A ``(in, rank)`` drawn, B ``(rank, out)`` zero at first.

Source: Hu et al. 2021 (arXiv:2106.09685), section 4.1; shapes and names as mlx-lm stores them. On an embedding A is
``(tokens, rank)`` and B ``(rank, width)``: the factors of the weight itself, not of its transpose.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qlab.core.adapter import AdapterKind
from qlab.core.training import LoRAConfig


class LoRALayer(nn.Module):
    """A frozen linear layer and its low-rank change."""

    def __init__(self, base: Any, config: LoRAConfig, outer: int, inner: int) -> None:
        super().__init__()
        dtype = getattr(mx, config.dtype)
        bound = 1 / math.sqrt(outer)
        self.base, self.scale = base, config.scale
        self.lora_a = mx.random.uniform(-bound, bound, (outer, config.rank)).astype(dtype)
        self.lora_b = mx.zeros((config.rank, inner), dtype)
        self._dropout = config.dropout
        if config.dropout:  # set anew for every step; the way back must draw the same mask again
            self.dropout_key = mx.random.key(0)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.base(x)
        # the factors follow the activations: a float32 factor would make everything after it float32
        return y + self.scale * ((self.dropped(x) @ self.lora_a.astype(x.dtype)) @ self.lora_b.astype(x.dtype))

    def dropped(self, x: mx.array) -> mx.array:
        """Set a share of the numbers to zero while training, and make up for it in the others."""
        if not self._dropout or not self.training:
            return x
        return x * mx.random.bernoulli(1 - self._dropout, x.shape, self.dropout_key) * (1 / (1 - self._dropout))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # models ask their layers for sizes, and some for the weight
            return getattr(super().__getattr__("base"), name)


class LoRAEmbedding(LoRALayer):
    """The same on an embedding, as look-up and as tied output head."""

    def __call__(self, tokens: mx.array) -> mx.array:
        y = self.base(tokens)
        return y + self.scale * self.dropped(self.lora_a[tokens].astype(y.dtype) @ self.lora_b.astype(y.dtype))

    def as_linear(self, x: mx.array) -> mx.array:
        """Multiply by the transposed embedding."""
        z = (self.dropped(x) @ self.lora_b.T.astype(x.dtype)) @ self.lora_a.T.astype(x.dtype)
        return self.base.as_linear(x) + self.scale * z


class LoRA(AdapterKind):
    """Low-rank adapters."""

    name = "lora"
    title = "LoRA: a product of two thin matrices, added"
    adapts = ("linear", "embedding")

    def shapes(self, shape: tuple[int, ...], rank: int, kind: str = "linear") -> dict[str, tuple[int, ...]]:
        outer, inner = shape if kind == "embedding" else shape[::-1]
        return {"lora_a": (outer, rank), "lora_b": (rank, inner)}

    def make(self, base: Any, shape: tuple[int, ...], config: LoRAConfig) -> Any:
        if hasattr(base.layer, "as_linear"):
            return LoRAEmbedding(base, config, *shape)
        return LoRALayer(base, config, *shape[::-1])

    def compensated(self, outer: Any, inner: Any, norms: Any) -> dict[str, Any]:
        return {"lora_a": outer, "lora_b": inner}


SHELF = (LoRA(),)
