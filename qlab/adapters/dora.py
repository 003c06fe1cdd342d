"""DoRA: ``W = m · (W0 + scale·ΔW) / ‖W0 + scale·ΔW‖``, the norm taken row by row.

Direction and magnitude are learned apart: ΔW = B·A turns the rows, m sets their lengths.

Source: Liu et al. 2024 (arXiv:2402.09353), equation 5; the norm gets no gradient (section 4.3).
Names and shapes as mlx-lm stores them, ``m`` ``(out,)``. No dense weight is ever built: row by row

    ‖W0 + s·BA‖² = ‖W0‖² + 2s·⟨W0, BA⟩ + s²·‖BA‖²

needs only the product of the base with as many rows as the rank, so every storage of the base
serves, and nothing dense stays until the backward pass. The experts of a mixture have lengths each,
``m`` ``(experts, out)``; mlx-lm has no such layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from qlab.core.config.lora import AdapterKind, LoRAConfig, Shapes
from qlab.core.config.spec import LayerSpec
from qlab.nn.kinds import layer_kind
from qlab.nn.low_rank import LowRank, factors, low_rank_change

_TINY = 1e-20  # smallest squared norm: a row of zeros has no direction


class DoRALayer(LowRank):
    """A frozen linear layer, a low-rank change of its directions, and the length of every row."""

    castable = False  # the norms need the factors in float32

    def __init__(self, base: Any, config: LoRAConfig, shapes: Shapes) -> None:
        super().__init__(base, config, shapes)
        self.base_square = mx.square(base.dense(mx.float32)).sum(-1)  # ‖W0‖², (…, out)
        lengths = mx.sqrt(self.base_square)
        self.m = lengths.astype(self.lora_a.dtype)
        self.freeze(recurse=False, keys=["base_square"])

    def __call__(self, x: mx.array) -> mx.array:
        gain = self._gain_of_rows().astype(x.dtype)
        y = self.base(x)
        plain = self._without_bias(y)
        b = self.lora_b.astype(x.dtype)
        added = self.inner(x) @ b
        return _lengthened(y, plain, added, gain)

    def _gain_of_rows(self) -> mx.array:
        """Return m divided by the norms of the rows, float32 ``(out,)``."""
        a = _constant(self.lora_a)  # (in, rank)
        b = _constant(self.lora_b)  # (rank, out)
        base_of_a = self.base(a.T)  # AᵀW0ᵀ and the bias, (rank, out)
        crossed = self._without_bias(base_of_a) * b
        inner = a.T @ a  # (rank, rank)
        squared = inner @ b * b
        return self._gain(self.base_square, self.m, crossed.sum(0), squared.sum(0))

    def _gain(self, start: mx.array, m: mx.array, crossed: mx.array, squared: mx.array) -> mx.array:
        """Return m divided by the norms of the rows, float32 ``(…, out)``.

        Args:
            start: ‖W0‖² of every row.
            m: lengths that are learned.
            crossed: ⟨W0, BA⟩ of every row.
            squared: ‖BA‖² of every row.
        """
        mixed = 2 * self.scale * crossed
        added = self.scale**2 * squared
        square = start + mixed + added
        length = m.astype(mx.float32)
        return length / _norm(square)

    def _without_bias(self, y: mx.array, experts: mx.array | None = None) -> mx.array:
        """Return outputs of the base less its bias; of experts, each less its expert's."""
        if "bias" not in self.base.layer:
            return y
        bias = self.base.layer.bias
        bias = bias.astype(y.dtype)
        if experts is not None:
            bias = bias[experts][..., None, :]  # (…, 1, out)
        return y - bias


class DoRAEmbedding(DoRALayer):
    """The same on an embedding, as look-up and as tied output head."""

    def __call__(self, tokens: mx.array) -> mx.array:
        y = self.base(tokens)  # (…, width)
        added = self.added_rows(tokens, y.dtype)
        start = _squared_length(y)
        # relative to the base's output here, so that its rounding is no change of length
        end = _squared_length(y + added)
        longer = end - start
        square = self.base_square[tokens] + longer
        length = self.m[tokens].astype(mx.float32)
        gain = length / _norm(square)
        gain = gain[..., None].astype(y.dtype)
        added = self.dropped(added)
        return _lengthened(y, y, added, gain)

    def as_linear(self, x: mx.array) -> mx.array:
        """Multiply by the transposed embedding: ``(…, width)`` → ``(…, tokens)``."""
        a = _constant(self.lora_a)  # (tokens, rank)
        b = _constant(self.lora_b)  # (rank, width)
        crossed = self.base.as_linear(b) * a.T  # (rank, tokens)
        inner = b @ b.T  # (rank, rank)
        squared = a @ inner * a  # (tokens, rank)
        gain = self._gain(self.base_square, self.m, crossed.sum(0), squared.sum(-1))
        gain = gain.astype(x.dtype)
        y = self.base.as_linear(x)
        a_transposed = self.lora_a.T.astype(x.dtype)
        added = self.inner_head(x) @ a_transposed
        return _lengthened(y, y, added, gain)


class DoRAExperts(DoRALayer):
    """The same on the experts of a mixture, each with its directions and lengths."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        count = len(self.base_square)
        # a single token reaches few experts: then the norms of these alone are computed
        is_few = indices.size < count
        if is_few:
            experts = indices.flatten()
        else:
            experts = mx.arange(count)
        gain = self._gain_of(experts, is_sorted=not is_few)  # (experts, out)
        gain = gain.astype(x.dtype)
        if is_few:
            gain = gain.reshape(*indices.shape, -1)
        else:
            gain = gain[indices]
        gain = gain[..., None, :]  # (…, 1, out)
        y = self.base(x, indices, sorted_indices=sorted_indices)  # (…, 1, out)
        plain = self._without_bias(y, indices)
        added = self.added_experts(x, indices, sorted_indices)
        return _lengthened(y, plain, added, gain)

    def _gain_of(self, experts: mx.array, is_sorted: bool) -> mx.array:
        a = _constant(self.lora_a)[experts]  # (experts, rank, in)
        b = _constant(self.lora_b)[experts].swapaxes(-1, -2)  # (experts, rank, out)
        base_of_a = self.base(a, experts, sorted_indices=is_sorted)
        crossed = self._without_bias(base_of_a, experts) * b
        inner = a @ a.swapaxes(-1, -2)  # (experts, rank, rank)
        squared = inner @ b * b
        start = self.base_square[experts]
        lengths = self.m[experts]
        return self._gain(start, lengths, crossed.sum(-2), squared.sum(-2))


def _constant(factor: mx.array) -> mx.array:
    """Return a factor for the norm, which gets no gradient."""
    full = factor.astype(mx.float32)
    return mx.stop_gradient(full)


def _squared_length(rows: mx.array) -> mx.array:
    """Return the squared length of every row, float32: ``(…, width)`` → ``(…)``."""
    full = rows.astype(mx.float32)
    return mx.square(full).sum(-1)


def _norm(square: mx.array) -> mx.array:
    positive = mx.maximum(square, _TINY)
    constant = mx.stop_gradient(positive)
    return mx.sqrt(constant)


def _lengthened(y: mx.array, plain: mx.array, added: mx.array, gain: mx.array) -> mx.array:
    """Return gain·(plain + added), and the bias that y has besides.

    Written so that a gain of 1 leaves the base's output to the bit.

    Args:
        y: output of the base, ``(…, out)``.
        plain: the same without bias.
        added: output of the low-rank product.
        gain: of every row of the weight, broadcast to ``(…, out)``.
    """
    longer = (gain - 1) * plain
    turned = gain * added
    return y + longer + turned


_MODULES = {"linear": DoRALayer, "embedding": DoRAEmbedding, "switch": DoRAExperts}


class DoRA(AdapterKind):
    """Weight-decomposed low-rank adapters."""

    name = "dora"
    title = "DoRA: low-rank directions, and the length of every row"
    adapts = ("linear", "embedding", "switch")

    def shapes(self, shape: tuple[int, ...], rank: int, kind: str = "linear") -> Shapes:
        shapes = factors(shape, rank, kind)
        lengths = shape[:-1]
        return {**shapes, "m": lengths}

    def make(self, base: Any, shape: tuple[int, ...], config: LoRAConfig) -> Any:
        kind = layer_kind(base.layer)
        module = _MODULES[kind]
        shapes = factors(shape, config.rank, kind)
        return module(base, config, shapes)

    def compensated(self, outer: Any, inner: Any, norms: Any) -> dict[str, Any]:
        return {"lora_a": outer, "lora_b": inner, "m": norms}

    def change(
        self, arrays: Mapping[str, mx.array], weight: mx.array, config: LoRAConfig, kind: str
    ) -> mx.array:
        """Return D = m · (W + scale·BA) / ‖W + scale·BA‖ − W; see ``AdapterKind.change``."""
        low_rank = low_rank_change(arrays, config.scale, kind)
        turned = weight + low_rank
        square = mx.square(turned).sum(-1, keepdims=True)
        lengths = arrays["m"][..., None]
        adapted = lengths * turned / _norm(square)
        return adapted - weight

    def mlx_obstacle(self, layer: LayerSpec) -> str | None:
        if type(self) is not DoRA:
            return super().mlx_obstacle(layer)
        if layer.kind == "switch":
            return f"it has no DoRA of experts ({layer.path!r}); kind='lora' is the nearest"
        if layer.storage and layer.kind == "embedding":
            return f"its DoRA reads no quantized embedding ({layer.path!r})"
        bits = layer.storage.bits if layer.storage else 32
        if 32 % bits:
            return f"its DoRA fails on {bits}-bit weights ({layer.path!r})"
        return None

    def peft_obstacle(self, layer: LayerSpec) -> str | None:
        if type(self) is not DoRA:
            return super().peft_obstacle(layer)
        if layer.kind == "embedding":
            return f"PEFT's DoRA of an embedding ({layer.path!r}) scales columns, not rows"
        return None

    def peft_settings(self) -> dict[str, Any] | None:
        if type(self) is not DoRA:
            return None
        return {"use_dora": True}


SHELF = (DoRA(),)
