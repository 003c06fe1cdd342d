"""LoRA: ``y = base(x) + scale · (x·A)·B``, A ``(in, rank)`` drawn, B ``(rank, out)`` zero at first.

Source: Hu et al. 2021 (arXiv:2106.09685), section 4.1; shapes and names as mlx-lm stores them. On
an embedding A is ``(tokens, rank)`` and B ``(rank, width)``: the factors of the weight itself, not
of its transpose. Each expert of a mixture has two factors, A ``(experts, rank, in)`` and B
``(experts, out, rank)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from qlab.core.config.lora import AdapterKind, LoRAConfig, Shapes
from qlab.core.config.spec import LayerSpec
from qlab.nn.kinds import layer_kind
from qlab.nn.low_rank import LowRank, factors, low_rank_change
from qlab.ops.matmul import add_product


class LoRALayer(LowRank):
    """A frozen linear layer and its low-rank change."""

    def __call__(self, x: mx.array) -> mx.array:
        if self.drops:
            y = self.base(x)
            inner = self.inner(x)
            return add_product(y, inner, self.lora_b)
        a = self.lora_a.astype(x.dtype)
        b = self.lora_b.astype(x.dtype)
        return self.base.adapted(x, a, b, self.scale)


class LoRAEmbedding(LowRank):
    """The same on an embedding, as look-up and as tied output head."""

    def __call__(self, tokens: mx.array) -> mx.array:
        y = self.base(tokens)
        added = self.added_rows(tokens, y.dtype)
        return y + self.dropped(added)

    def as_linear(self, x: mx.array) -> mx.array:
        """Multiply by the transposed embedding."""
        y = self.base.as_linear(x)
        inner = self.inner_head(x)
        return add_product(y, inner, self.lora_a.T)


class LoRAExperts(LowRank):
    """The same on the experts of a mixture, each with two factors."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        y = self.base(x, indices, sorted_indices=sorted_indices)
        added = self.added_experts(x, indices, sorted_indices)
        return y + added


_MODULES = {"linear": LoRALayer, "embedding": LoRAEmbedding, "switch": LoRAExperts}


class LoRA(AdapterKind):
    """Low-rank adapters.

    A subclass computes something that mlx-lm and PEFT do not, so neither is said to open it.
    """

    name = "lora"
    title = "LoRA: a product of two thin matrices, added"
    adapts = ("linear", "embedding", "switch")

    def shapes(self, shape: tuple[int, ...], rank: int, kind: str = "linear") -> Shapes:
        return factors(shape, rank, kind)

    def make(self, base: Any, shape: tuple[int, ...], config: LoRAConfig) -> Any:
        kind = layer_kind(base.layer)
        module = _MODULES[kind]
        shapes = factors(shape, config.rank, kind)
        return module(base, config, shapes)

    def compensated(self, outer: Any, inner: Any, norms: Any) -> dict[str, Any]:
        return {"lora_a": outer, "lora_b": inner}

    def change(
        self, arrays: Mapping[str, mx.array], weight: mx.array, config: LoRAConfig, kind: str
    ) -> mx.array:
        """Return D = scale · B·A; see ``AdapterKind.change``."""
        return low_rank_change(arrays, config.scale, kind)

    def mlx_obstacle(self, layer: LayerSpec) -> str | None:
        if type(self) is LoRA:
            return None
        return super().mlx_obstacle(layer)

    def peft_obstacle(self, layer: LayerSpec) -> str | None:
        if type(self) is LoRA:
            return None
        return super().peft_obstacle(layer)

    def peft_settings(self) -> dict[str, Any] | None:
        if type(self) is not LoRA:
            return None
        return {"use_dora": False}


SHELF = (LoRA(),)
