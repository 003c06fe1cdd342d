"""DoRA: ``W = m · (W0 + scale·ΔW) / ‖W0 + scale·ΔW‖``, the norm taken row by row.

Direction and magnitude learned apart.

Source: Liu et al. 2024 (arXiv:2402.09353), equation 5; the norm gets no gradient (section 4.3).
Names and shapes as mlx-lm stores them, ``m`` ``(out,)``. No weight is ever built: ‖W0 + s·BA‖² =
‖W0‖² + 2s·⟨W0, BA⟩ + s²·‖BA‖² needs the product of the base with as many rows as the rank, so every
storage of the base serves, and nothing dense is kept for the way back. The experts of a mixture
have lengths of their own, ``m`` ``(experts, out)``; mlx-lm has no such layer.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from qlab.core.config.lora import AdapterKind, LoRAConfig
from qlab.nn.kinds import layer_kind
from qlab.nn.low_rank import LowRank, Shapes, factors


class DoRALayer(LowRank):
    """A frozen linear layer, a low-rank change of its directions, and the length of every row."""

    castable = False

    def __init__(self, base: Any, config: LoRAConfig, shapes: Shapes) -> None:
        super().__init__(base, config, shapes)
        self.base_square = mx.square(base.dense(mx.float32)).sum(-1)
        self.m = mx.sqrt(self.base_square).astype(self.lora_a.dtype)
        self.freeze(recurse=False, keys=["base_square"])

    def __call__(self, x: mx.array) -> mx.array:
        a = _constant(self.lora_a)
        b = _constant(self.lora_b)
        crossed = self._without_bias(self.base(a.T)) * b  # (rank, out)
        gain = self._gain(
            self.base_square, self.m, crossed.sum(0), ((a.T @ a) @ b * b).sum(0)
        ).astype(x.dtype)
        y = self.base(x)
        return _lengthened(
            y, self._without_bias(y), self.inner(x) @ self.lora_b.astype(x.dtype), gain
        )

    def _gain(self, start: mx.array, m: mx.array, crossed: mx.array, squared: mx.array) -> mx.array:
        """M divided by the rows' norms, from ‖W0‖², ⟨W0, BA⟩ and ‖BA‖² of every row, float32."""
        square = start + 2 * self.scale * crossed + self.scale**2 * squared
        return m.astype(mx.float32) / mx.sqrt(mx.stop_gradient(mx.maximum(square, _TINY)))

    def _without_bias(self, y: mx.array, experts: mx.array | None = None) -> mx.array:
        if "bias" not in self.base.layer:
            return y
        bias = self.base.layer.bias.astype(y.dtype)
        return y - (bias if experts is None else bias[experts][..., None, :])


class DoRAEmbedding(DoRALayer):
    """The same on an embedding, as look-up and as tied output head."""

    def __call__(self, tokens: mx.array) -> mx.array:
        y = self.base(tokens)
        z = self.added_rows(tokens, y.dtype)
        square = mx.square((y + z).astype(mx.float32)).sum(-1)
        start = mx.square(y.astype(mx.float32)).sum(-1)
        # measured from what the base says here, so that rounding of its output is no change of
        # length
        square = self.base_square[tokens] + (square - start)
        norm = mx.sqrt(mx.stop_gradient(mx.maximum(square, _TINY)))
        gain = (self.m[tokens].astype(mx.float32) / norm)[..., None].astype(y.dtype)
        return _lengthened(y, y, self.dropped(z), gain)

    def as_linear(self, x: mx.array) -> mx.array:
        """Multiply by the transposed embedding."""
        a = _constant(self.lora_a)
        b = _constant(self.lora_b)
        crossed = self.base.as_linear(b) * a.T  # (rank, tokens)
        gain = self._gain(
            self.base_square, self.m, crossed.sum(0), (a @ (b @ b.T) * a).sum(-1)
        ).astype(x.dtype)
        y = self.base.as_linear(x)
        return _lengthened(y, y, self.inner_head(x) @ self.lora_a.T.astype(x.dtype), gain)


class DoRAExperts(DoRALayer):
    """The same on the experts of a mixture, each with directions and lengths of its own."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        # norms of the experts at work if these are few (a single token), else of all
        few = indices.size < len(self.base_square)
        experts = indices.flatten() if few else mx.arange(len(self.base_square))
        a = _constant(self.lora_a)[experts]
        b = _constant(self.lora_b)[experts].swapaxes(-1, -2)
        crossed = (
            self._without_bias(self.base(a, experts, sorted_indices=not few), experts) * b
        )  # (experts, rank, out)
        squared = ((a @ a.swapaxes(-1, -2)) @ b * b).sum(-2)
        gain = self._gain(
            self.base_square[experts], self.m[experts], crossed.sum(-2), squared
        ).astype(x.dtype)
        gain = gain.reshape(*indices.shape, -1) if few else gain[indices]
        y = self.base(x, indices, sorted_indices=sorted_indices)
        added = self.added_experts(x, indices, sorted_indices)
        return _lengthened(y, self._without_bias(y, indices), added, gain[..., None, :])


def _constant(factor: mx.array) -> mx.array:
    return mx.stop_gradient(factor.astype(mx.float32))


def _lengthened(y: mx.array, plain: mx.array, added: mx.array, gain: mx.array) -> mx.array:
    """Return gain·(plain + added), and the bias that y has besides.

    A gain of 1 leaves the base's own output.
    """
    return y + (gain - 1) * plain + gain * added


class DoRA(AdapterKind):
    """Weight-decomposed low-rank adapters."""

    name = "dora"
    title = "DoRA: low-rank directions, and the length of every row"
    adapts = ("linear", "embedding", "switch")

    def shapes(
        self, shape: tuple[int, ...], rank: int, kind: str = "linear"
    ) -> dict[str, tuple[int, ...]]:
        return {**factors(shape, rank, kind), "m": shape[:-1]}

    def make(self, base: Any, shape: tuple[int, ...], config: LoRAConfig) -> Any:
        kind = layer_kind(base.layer)
        made = {"linear": DoRALayer, "embedding": DoRAEmbedding, "switch": DoRAExperts}[kind]
        return made(base, config, factors(shape, config.rank, kind))

    def compensated(self, outer: Any, inner: Any, norms: Any) -> dict[str, Any]:
        return {"lora_a": outer, "lora_b": inner, "m": norms}


_TINY = 1e-20  # a row of zeros has no direction
SHELF = (DoRA(),)
