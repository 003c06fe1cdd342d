"""LoRA: ``y = base(x) + scale · (x·A)·B``, A ``(in, rank)`` drawn, B ``(rank, out)`` zero at first.

Source: Hu et al. 2021 (arXiv:2106.09685), section 4.1; shapes and names as mlx-lm stores them.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qlab.core.adapter import AdapterKind
from qlab.core.training import LoRAConfig


class LoRALayer(nn.Module):
    """A frozen layer and its low-rank change."""

    def __init__(self, base: Any, shape: tuple[int, ...], config: LoRAConfig) -> None:
        super().__init__()
        out, width = shape
        dtype = getattr(mx, config.dtype)
        bound = 1 / math.sqrt(width)
        self.base, self.scale = base, config.scale
        self.lora_a = mx.random.uniform(-bound, bound, (width, config.rank)).astype(dtype)
        self.lora_b = mx.zeros((config.rank, out), dtype)
        self._dropout = config.dropout
        if config.dropout:  # set anew for every step; the way back must draw the same mask again
            self.dropout_key = mx.random.key(0)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.base(x)
        # the factors follow the activations: a float32 factor would make everything after it float32
        if self._dropout and self.training:
            kept = mx.random.bernoulli(1 - self._dropout, x.shape, self.dropout_key)
            x = x * kept * (1 / (1 - self._dropout))
        z = (x @ self.lora_a.astype(x.dtype)) @ self.lora_b.astype(x.dtype)
        return y + self.scale * z


class LoRA(AdapterKind):
    """Low-rank adapters."""

    name = "lora"
    title = "LoRA: a product of two thin matrices, added"

    def shapes(self, shape: tuple[int, ...], rank: int) -> dict[str, tuple[int, ...]]:
        return {"lora_a": (shape[-1], rank), "lora_b": (rank, shape[-2])}

    def make(self, base: Any, shape: tuple[int, ...], config: LoRAConfig) -> Any:
        return LoRALayer(base, shape, config)


SHELF = (LoRA(),)
