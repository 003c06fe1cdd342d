"""What all low-rank kinds share.

Two thin factors beside a frozen layer, and the inputs that are dropped on their way.

On a linear layer, an embedding and the experts of a mixture; named and shaped as mlx-lm stores them
(``mlx_lm/tuner/lora.py``). Knows no model, and not what a kind makes of the product.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qlab.core.config.lora import LoRAConfig, Shapes
from qlab.ops.matmul import routed


def factors(shape: tuple[int, ...], rank: int, kind: str) -> Shapes:
    """Shapes of the two factors of a weight.

    Args:
        shape: ``(out, in)``, of an embedding ``(tokens, width)``, of experts ``(experts, out,
            in)``.
        rank: inner width.
        kind: of the layer.
    """
    *experts, out, width = shape
    if experts:
        return {"lora_a": (*experts, rank, width), "lora_b": (*experts, out, rank)}
    outer, inner = (out, width) if kind == "embedding" else (width, out)
    return {"lora_a": (outer, rank), "lora_b": (rank, inner)}


def low_rank_change(arrays: Mapping[str, mx.array], scale: float, kind: str) -> mx.array:
    """Return scale·B·A in the shape of the weight, ``(…, out, in)``.

    Args:
        arrays: the factors ``lora_a`` and ``lora_b``, shaped as ``factors`` says.
        scale: before the product.
        kind: of the layer.
    """
    a = arrays["lora_a"]
    b = arrays["lora_b"]
    if kind == "switch":
        return scale * (b @ a)
    if kind == "embedding":
        return scale * (a @ b)
    return scale * (a @ b).T


class LowRank(nn.Module):
    """A frozen layer and two factors.

    The first drawn, the second zero, so that their product is nothing at first.

    The factors follow the activations: a float32 factor would make everything after it float32.

    Args:
        base: the frozen layer; see ``AdapterKind.make``.
        config: scale, dropout, dtype.
        shapes: what ``factors`` returns.

    Attributes:
        castable: whether nothing but products with activations reads the factors, so that a step
            may cast them beforehand.
    """

    castable = True

    def __init__(self, base: Any, config: LoRAConfig, shapes: Shapes) -> None:
        super().__init__()
        dtype = getattr(mx, config.dtype)
        first = shapes["lora_a"]
        bound = 1 / math.sqrt(first[-1] if len(first) == 3 else first[0])
        self.base = base
        self.scale = config.scale
        self.lora_a = mx.random.uniform(-bound, bound, first).astype(dtype)
        self.lora_b = mx.zeros(shapes["lora_b"], dtype)
        self._dropout = config.dropout
        if config.dropout:  # set anew for every step; the way back must draw the same mask again
            self.dropout_key = mx.random.key(0)

    @property
    def drops(self) -> bool:
        """Whether inputs are dropped now."""
        return bool(self._dropout) and self.training

    def dropped(self, x: mx.array) -> mx.array:
        """Set a share of the numbers to zero while training, and make up for it in the others."""
        if not self.drops:
            return x
        return (
            x
            * mx.random.bernoulli(1 - self._dropout, x.shape, self.dropout_key)
            * (1 / (1 - self._dropout))
        )

    def inner(self, x: mx.array) -> mx.array:
        """Return scale·x·A of a linear layer, ``(…, rank)``: scaled here, where it is small."""
        return self.scale * (self.dropped(x) @ self.lora_a.astype(x.dtype))

    def added_rows(self, tokens: mx.array, dtype: mx.Dtype) -> mx.array:
        """Return scale·A·B of an embedding at some tokens, nothing dropped."""
        return (self.scale * self.lora_a[tokens].astype(dtype)) @ self.lora_b.astype(dtype)

    def inner_head(self, x: mx.array) -> mx.array:
        """Return scale·x·Bᵀ of an embedding as output head, ``(…, rank)``."""
        return self.scale * (self.dropped(x) @ self.lora_b.T.astype(x.dtype))

    def added_experts(self, x: mx.array, indices: mx.array, sorted_indices: bool) -> mx.array:
        """Return scale·(x·Aᵀ)·Bᵀ, every row of x with the factors of its own expert."""
        z = self.scale * routed(
            self.dropped(x), self.lora_a.astype(x.dtype), indices, sorted_indices
        )
        return routed(z, self.lora_b.astype(x.dtype), indices, sorted_indices)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # models ask their layers for sizes, and some for the weight
            return getattr(super().__getattr__("base"), name)
