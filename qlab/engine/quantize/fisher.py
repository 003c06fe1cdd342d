"""One forward and backward pass over a short text: what an error in each weight costs, in nats.

Gives Fisher weights, and the second moments of every layer's inputs. Knows no scheme: importance is
a property of the model and the text.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from qlab.core.progress import Progress
from qlab.engine.models.surgery import map_layers
from qlab.nn.kinds import layer_kind


@dataclass(frozen=True)
class Calibration:
    """Importance of the weights of every layer that the text reached.

    The predicted ΔKL of a layer whose weight W becomes W+E is ½ Σ_oi F[o,i]·E[o,i]² nats per token,
    F the diagonal of the Fisher information of the weights, F[o,i] = E[(Σ_t g[t,o]·x[t,i])²] / T
    over rows of T tokens. Rounding errors are nearly independent of each other, so the diagonal is
    what counts; the sum over tokens stands inside the square because one error acts on all tokens
    at once. F is kept as the product of its margins, Σ_p r_p ⊗ c_p. (A product of *separate* second
    moments of g and x, as in K-FAC, ranks layers worse: docs/log.md.)

    Attributes:
        pairs: by path, ``(r, c)`` float32 vectors of lengths ``out`` and ``in``; a tied embedding
            has two pairs.
        input_power: by path, float32 ``(in,)``, mean square of each input feature.
        tokens: number of tokens in the text.
        text: what the text was, in words.
    """

    pairs: dict[str, list[tuple[np.ndarray, np.ndarray]]] = field(default_factory=dict)
    input_power: dict[str, np.ndarray] = field(default_factory=dict)
    tokens: int = 0
    text: str = ""


@mx.custom_function
def _tap(y: mx.array, x: mx.array, rows: mx.array, columns: mx.array, power: mx.array) -> mx.array:
    """Identity on y, whose "gradients" are the margins of (gᵀx)² and Σ_t x².

    The margins need no matrix of the weight's size: Σ_i (gᵀx)²[o,i] = Σ_ts
    g[t,o]·(x·xᵀ)[t,s]·g[s,o].
    """
    return y + mx.zeros((), y.dtype)


@_tap.vjp
def _tap_vjp(primals, cotangent, _):
    _, x, rows, columns, power = primals
    g = cotangent.astype(mx.float32).reshape(-1, rows.shape[0])
    inputs = x.astype(mx.float32).reshape(-1, columns.shape[0])
    by_row = (((inputs @ inputs.T) @ g) * g).sum(0)
    by_column = (((g @ g.T) @ inputs) * inputs).sum(0)
    return cotangent, mx.zeros_like(x), by_row, by_column, mx.square(inputs).sum(0)


@mx.custom_function
def _tap_lookup(y: mx.array, tokens: mx.array, rows: mx.array, columns: mx.array) -> mx.array:
    """The same for an embedding, whose inputs are one-hot."""
    return y + mx.zeros((), y.dtype)


@_tap_lookup.vjp
def _tap_lookup_vjp(primals, cotangent, _):
    _, tokens, rows, columns = primals
    g = cotangent.astype(mx.float32).reshape(-1, columns.shape[0])
    ids = tokens.reshape(-1)
    same = (ids[:, None] == ids[None]).astype(mx.float32)
    product = (same @ g) * g
    return (
        cotangent,
        mx.zeros_like(tokens),
        mx.zeros_like(rows).at[ids].add(product.sum(1)),
        product.sum(0),
    )


class _Tapped(nn.Module):
    """A layer that reports what passes through it.

    An embedding does so as look-up and as tied output head.
    """

    def __init__(self, inner: nn.Module, shape: tuple[int, int]) -> None:
        super().__init__()
        self.inner = inner
        self.rows = mx.zeros(shape[0])
        self.columns = mx.zeros(shape[1])
        self.power = mx.zeros(shape[1])
        self.freeze()
        self.unfreeze(recurse=False, keys=["rows", "columns", "power"])

    def _watch(self, y: mx.array, x: mx.array) -> mx.array:
        return _tap(y, mx.stop_gradient(x), self.rows, self.columns, self.power)


class _TappedLinear(_Tapped):
    def __call__(self, x: mx.array) -> mx.array:
        return self._watch(self.inner(x), x)


class _TappedEmbedding(_Tapped):
    def __init__(self, inner: nn.Module, shape: tuple[int, int]) -> None:
        super().__init__(inner, shape)
        self.lookup_rows = mx.zeros(shape[0])
        self.lookup_columns = mx.zeros(shape[1])

    def __call__(self, tokens: mx.array) -> mx.array:
        return _tap_lookup(self.inner(tokens), tokens, self.lookup_rows, self.lookup_columns)

    def as_linear(self, x: mx.array) -> mx.array:
        return self._watch(self.inner.as_linear(x), x)


def calibrate(
    model: nn.Module,
    shapes: dict[str, tuple[int, int]],
    batches: list[mx.array],
    text: str,
    seed: int = 0,
) -> Generator[Progress, None, Calibration]:
    """Run the text through a model once, forward and backward.

    The label of each position is drawn from the model's own prediction, which makes the squared
    gradient an unbiased estimate of the Fisher information (Kunstner et al., arXiv:1905.12558 §3:
    not the "empirical" one).

    Args:
        model: a dense model; it is not changed.
        shapes: ``(out, in)`` of every linear and embedding layer to watch, by path.
        batches: token ids, ``(1, T)`` each.
        text: what the text is, in words.
        seed: of the drawn labels.

    Yields:
        Progress after each batch.
    """

    def tapped(path: str, inner: nn.Module) -> nn.Module:
        return (_TappedEmbedding if layer_kind(inner) == "embedding" else _TappedLinear)(
            inner, shapes[path]
        )

    watched = map_layers(model, list(shapes), tapped)
    for module in watched.modules():
        if not isinstance(module, _Tapped):
            module.freeze(recurse=False)

    def score(tokens: mx.array, key: mx.array) -> mx.array:
        logits = watched(tokens).astype(mx.float32)
        drawn = mx.random.categorical(mx.stop_gradient(logits), key=key)
        return -nn.losses.cross_entropy(logits, drawn, reduction="sum")

    grad = nn.value_and_grad(watched, score)
    key = mx.random.key(seed)
    totals: dict[str, np.ndarray] = {}
    count = 0
    for i, tokens in enumerate(batches):
        key, sub = mx.random.split(key)
        found = tree_flatten(grad(tokens, sub)[1])
        mx.eval([value for _, value in found])
        for name, value in found:
            totals[name] = totals.get(name, 0) + np.array(value, np.float64)
        count += tokens.size
        yield Progress("predicting ΔKL", i + 1, len(batches))
    return _collect(totals, shapes, count, text)


def _collect(totals: dict[str, np.ndarray], shapes: dict, count: int, text: str) -> Calibration:
    made = Calibration(tokens=count, text=text)
    for path in shapes:
        for site in ("", "lookup_"):
            rows, columns = (totals.get(f"{path}.{site}{axis}") for axis in ("rows", "columns"))
            if rows is None or columns is None or not rows.sum() > 0:
                continue
            # a margin of squares is not negative; products of float32 sums may be, by a little
            pair = np.maximum(rows, 0) / count, np.maximum(columns, 0) / rows.sum()
            made.pairs.setdefault(path, []).append(tuple(v.astype(np.float32) for v in pair))
        power = totals.get(f"{path}.power")
        if power is not None and power.any():
            made.input_power[path] = (power / count).astype(np.float32)
    return made
