"""What all low-rank adapters share: two thin factors beside a frozen layer, and dropout.

On a linear layer, an embedding and the experts of a mixture; named and shaped as mlx-lm stores them
(``mlx_lm/tuner/lora.py``). What a kind of adapter does with the product stands in
``qlab/adapters/``.
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
    """Return the shapes of the two factors of a weight, by name.

    Example:
        >>> factors((128, 64), rank=8, kind="linear")
        {'lora_a': (64, 8), 'lora_b': (8, 128)}

    Args:
        shape: ``(out, in)``, of an embedding ``(tokens, width)``, of experts ``(experts, out,
            in)``.
        rank: inner width.
        kind: of the layer; see ``layer_kind``.
    """
    *experts, out, width = shape
    if experts:
        return {"lora_a": (*experts, rank, width), "lora_b": (*experts, out, rank)}
    if kind == "embedding":
        return {"lora_a": (out, rank), "lora_b": (rank, width)}
    return {"lora_a": (width, rank), "lora_b": (rank, out)}


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
    """A frozen layer and two factors, whose product changes nothing at first.

    The first factor is drawn at random, the second is zero. Both are cast to the dtype of the
    activations: a float32 factor would make everything after it float32.

    Args:
        base: the frozen layer; see ``AdapterKind.make``.
        config: scale, dropout, dtype.
        shapes: what ``factors`` returns.

    Attributes:
        base: the frozen layer.
        scale: of the product.
        lora_a: first factor; see ``factors`` for its shape.
        lora_b: second factor.
        castable: whether nothing but products with activations reads the factors, so that a step
            may cast them beforehand.
    """

    castable = True

    def __init__(self, base: Any, config: LoRAConfig, shapes: Shapes) -> None:
        super().__init__()
        dtype = getattr(mx, config.dtype)
        first = shapes["lora_a"]
        width = first[-1] if len(first) == 3 else first[0]
        bound = 1 / math.sqrt(width)
        self.base = base
        self.scale = config.scale
        self.lora_a = mx.random.uniform(-bound, bound, first).astype(dtype)
        self.lora_b = mx.zeros(shapes["lora_b"], dtype)
        self._dropout = config.dropout
        if config.dropout:
            # set anew for every step; the backward pass must draw the same mask again
            self.dropout_key = mx.random.key(0)

    @property
    def drops(self) -> bool:
        """Whether inputs are dropped now: only while training."""
        return bool(self._dropout) and self.training

    def dropped(self, x: mx.array) -> mx.array:
        """Set a share of the inputs to zero, and scale the others up, so that the mean stays."""
        if not self.drops:
            return x
        keep = 1 - self._dropout
        return x * mx.random.bernoulli(keep, x.shape, self.dropout_key) * (1 / keep)

    def inner(self, x: mx.array) -> mx.array:
        """Return scale·x·A of a linear layer, ``(…, rank)``: scaled here, where it is small."""
        return self.scale * (self.dropped(x) @ self.lora_a.astype(x.dtype))

    def added_rows(self, tokens: mx.array, dtype: mx.Dtype) -> mx.array:
        """Return scale·A·B of an embedding at some tokens, ``(…, width)``, nothing dropped."""
        rows = self.scale * self.lora_a[tokens].astype(dtype)  # (…, rank)
        return rows @ self.lora_b.astype(dtype)

    def inner_head(self, x: mx.array) -> mx.array:
        """Return scale·x·Bᵀ of an embedding as output head, ``(…, rank)``."""
        return self.scale * (self.dropped(x) @ self.lora_b.T.astype(x.dtype))

    def added_experts(self, x: mx.array, indices: mx.array, sorted_indices: bool) -> mx.array:
        """Return scale·(x·Aᵀ)·Bᵀ, every row of x with the factors of its expert.

        Args:
            x: ``(…, 1, in)``.
            indices: ``(…)``, the expert of every row.
            sorted_indices: whether they ascend.

        Returns:
            ``(…, 1, out)``.
        """
        first = self.lora_a.astype(x.dtype)  # (experts, rank, in)
        second = self.lora_b.astype(x.dtype)  # (experts, out, rank)
        inner = self.scale * routed(self.dropped(x), first, indices, sorted_indices)
        return routed(inner, second, indices, sorted_indices)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # models ask their layers for sizes, and some for the weight
            return getattr(super().__getattr__("base"), name)
