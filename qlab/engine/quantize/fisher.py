"""One forward and backward pass over a short text: what an error in each weight costs, in nats.

``ModelMeasurements.predict`` calls ``calibrate``, and ``table_filler`` turns its result into
predicted ΔKL. It also gives the mean squares of every layer's inputs, which some solvers need.

How it works: each layer is wrapped so that its output passes an identity function ("tap") with a
custom gradient. In the backward pass the tap sees the output's gradient g and the layer's input x,
and returns what is wanted of them as the "gradients" of vectors that take no other part.

Shapes: T tokens in a row of text, ``out`` and ``in`` features of a layer.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from qlab.core.progress import Progress
from qlab.engine.models.surgery import map_layers
from qlab.nn.kinds import layer_kind
from qlab.ops.sums import cross_entropy

Array = np.ndarray
Pair = tuple[Array, Array]
Totals = dict[str, Array]
Shapes = Mapping[str, Sequence[int]]
_Arrays = tuple[mx.array, ...]


@dataclass(frozen=True)
class Calibration:
    """Importance of the weights of every layer that the text reached.

    The predicted ΔKL of a layer whose weight W becomes W+E is ½ Σ_oi F[o,i]·E[o,i]² nats per token,
    F the diagonal of the Fisher information of the weights, F[o,i] = E[(Σ_t g[t,o]·x[t,i])²] / T
    over rows of T tokens. Rounding errors are nearly independent of each other, so the diagonal is
    what counts; the sum over tokens stands inside the square because one error acts on all tokens
    at once. F is stored as the product of its margins, Σ_p r_p ⊗ c_p. (A product of *separate*
    second moments of g and x, as in K-FAC, ranks layers worse: docs/log.md.)

    Attributes:
        pairs: by path, ``(r, c)`` float32 vectors of lengths ``out`` and ``in``; a tied embedding
            has two pairs.
        input_power: by path, float32 ``(in,)``, mean square of each input feature.
        tokens: number of tokens in the text.
        text: what the text was, in words.
    """

    pairs: dict[str, list[Pair]] = field(default_factory=dict)
    input_power: Totals = field(default_factory=dict)
    tokens: int = 0
    text: str = ""


@mx.custom_function
def _tap(y: mx.array, x: mx.array, rows: mx.array, columns: mx.array, power: mx.array) -> mx.array:
    """Return y; the "gradients" of rows, columns and power are the sums that are wanted.

    With G = gᵀx, the gradient of the weight ``(out, in)``: rows Σ_i G[o,i]², columns Σ_o G[o,i]²,
    power Σ_t x[t,i]².

    Args:
        y: output of the layer, ``(1, T, out)``.
        x: its input, ``(1, T, in)``.
        rows: any values, ``(out,)``.
        columns: any values, ``(in,)``.
        power: any values, ``(in,)``.
    """
    return y + mx.zeros((), y.dtype)  # a function must not return its argument itself


@_tap.vjp
def _tap_vjp(primals: _Arrays, cotangent: mx.array, _: mx.array) -> _Arrays:
    _, x, rows, columns, _ = primals
    g = _per_token(cotangent, rows)  # (T, out)
    inputs = _per_token(x, columns)  # (T, in)
    # The margins of G² need no matrix of the weight's size:
    # Σ_i G[o,i]² = Σ_ts g[t,o]·(x·xᵀ)[t,s]·g[s,o], and the same with g and x exchanged.
    of_inputs = inputs @ inputs.T  # (T, T)
    by_row = (of_inputs @ g) * g
    of_g = g @ g.T  # (T, T)
    by_column = (of_g @ inputs) * inputs
    power = mx.square(inputs)
    no_gradient = mx.zeros_like(x)
    return cotangent, no_gradient, by_row.sum(0), by_column.sum(0), power.sum(0)


def _per_token(values: mx.array, features: mx.array) -> mx.array:
    """Return values as float32 ``(T, features)``."""
    count = features.shape[0]
    return values.astype(mx.float32).reshape(-1, count)


@mx.custom_function
def _tap_lookup(y: mx.array, tokens: mx.array, rows: mx.array, columns: mx.array) -> mx.array:
    """Do the same for an embedding, whose inputs are one-hot vectors.

    Args:
        y: embeddings of the tokens, ``(1, T, in)``.
        tokens: token ids, ``(1, T)``.
        rows: any values, one for each word of the vocabulary.
        columns: any values, ``(in,)``.
    """
    return y + mx.zeros((), y.dtype)


@_tap_lookup.vjp
def _tap_lookup_vjp(primals: _Arrays, cotangent: mx.array, _: mx.array) -> _Arrays:
    _, tokens, rows, columns = primals
    g = _per_token(cotangent, columns)  # (T, in)
    ids = tokens.reshape(-1)
    # x·xᵀ of one-hot inputs, (T, T): 1 where two positions hold the same token
    is_same = ids[:, None] == ids[None]
    same = is_same.astype(mx.float32)
    product = (same @ g) * g
    of_token = product.sum(1)
    by_row = mx.zeros_like(rows).at[ids].add(of_token)
    by_column = product.sum(0)
    no_gradient = mx.zeros_like(tokens)
    return cotangent, no_gradient, by_row, by_column


class _Tapped(nn.Module):
    """A layer whose outputs pass a tap.

    An embedding is tapped both as a look-up and as a tied output head.
    """

    def __init__(self, inner: nn.Module, shape: Sequence[int]) -> None:
        super().__init__()
        outputs, inputs = shape
        self.inner = inner
        self.rows = mx.zeros(outputs)
        self.columns = mx.zeros(inputs)
        self.power = mx.zeros(inputs)
        self.freeze()
        self.unfreeze(recurse=False, keys=["rows", "columns", "power"])

    def _watch(self, y: mx.array, x: mx.array) -> mx.array:
        inputs = mx.stop_gradient(x)
        outputs = _tap(y, inputs, self.rows, self.columns, self.power)
        return outputs  # pyright: ignore[reportReturnType]  # MLX's stub says object


class _TappedLinear(_Tapped):
    def __call__(self, x: mx.array) -> mx.array:
        outputs = self.inner(x)
        return self._watch(outputs, x)


class _TappedEmbedding(_Tapped):
    def __init__(self, inner: nn.Module, shape: Sequence[int]) -> None:
        super().__init__(inner, shape)
        words, features = shape
        self.lookup_rows = mx.zeros(words)
        self.lookup_columns = mx.zeros(features)

    def __call__(self, tokens: mx.array) -> mx.array:
        embeddings = self.inner(tokens)
        outputs = _tap_lookup(embeddings, tokens, self.lookup_rows, self.lookup_columns)
        return outputs  # pyright: ignore[reportReturnType]  # MLX's stub says object

    def as_linear(self, x: mx.array) -> mx.array:
        embedding: Any = self.inner
        outputs = embedding.as_linear(x)
        return self._watch(outputs, x)


def calibrate(
    model: nn.Module,
    shapes: Shapes,
    batches: Sequence[mx.array],
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
    watched = _with_taps(model, shapes)

    def score(tokens: mx.array, key: mx.array) -> mx.array:
        logits = watched(tokens).astype(mx.float32)
        prediction = mx.stop_gradient(logits)
        labels = mx.random.categorical(prediction, key=key)
        loss = cross_entropy(logits, labels).sum()
        return -loss

    grad = nn.value_and_grad(watched, score)
    key = mx.random.key(seed)
    totals: Totals = {}
    count = 0
    for done, tokens in enumerate(batches, 1):
        key, label_key = mx.random.split(key)
        _, gradients = grad(tokens, label_key)
        sums = dict(tree_flatten(gradients))
        mx.eval(sums)
        for name, value in sums.items():
            before = totals.get(name, 0)
            totals[name] = before + np.array(value, np.float64)
        count += tokens.size
        yield Progress("predicting ΔKL", done, len(batches))
    return _collect(totals, shapes, count, text)


def _with_taps(model: nn.Module, shapes: Shapes) -> nn.Module:
    """Return the model with its layers tapped; only what the taps report has gradients."""

    def tapped(path: str, inner: nn.Module) -> nn.Module:
        is_embedding = layer_kind(inner) == "embedding"
        tap = _TappedEmbedding if is_embedding else _TappedLinear
        return tap(inner, shapes[path])

    watched = map_layers(model, list(shapes), tapped)
    for module in watched.modules():
        if not isinstance(module, _Tapped):
            module.freeze(recurse=False)
    return watched


def _collect(totals: Totals, shapes: Shapes, count: int, text: str) -> Calibration:
    """Turn sums over all tokens, by parameter name, into a calibration."""
    calibration = Calibration(tokens=count, text=text)
    for path in shapes:
        for site in ("", "lookup_"):
            pair = _margins(totals, f"{path}.{site}", count)
            if pair is None:
                continue
            pairs = calibration.pairs.setdefault(path, [])
            pairs.append(pair)
        power = totals.get(f"{path}.power")
        if power is not None and power.any():
            mean = power / count
            calibration.input_power[path] = mean.astype(np.float32)
    return calibration


def _margins(totals: Totals, prefix: str, count: int) -> Pair | None:
    """Return r ``(out,)`` and c ``(in,)`` of a tap, so that r ⊗ c has the margins of F."""
    rows = totals.get(f"{prefix}rows")
    columns = totals.get(f"{prefix}columns")
    if rows is None or columns is None:
        return None
    total = rows.sum()
    if not total > 0:
        return None
    # A margin of squares is not negative; a product of float32 sums may be, by a little.
    r = np.maximum(rows, 0) / count
    c = np.maximum(columns, 0) / total
    return r.astype(np.float32), c.astype(np.float32)
