"""One forward and backward pass over a short text: what each layer's inputs and outputs weigh.

Gives the second moments of every layer's inputs, and the Fisher weights that turn a weight error into nats. Knows no
scheme: importance is a property of the model and the text.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from qlab.core.panel import Progress
from qlab.engine.surgery import map_layers


@dataclass(frozen=True)
class Calibration:
    """Importance of the weights of every layer that the text reached.

    The predicted ΔKL of a layer whose weight W becomes W+E is ½ Σ_p Σ_oi r_p[o]·c_p[i]·E[o,i]² nats per token
    (the Fisher information of the output, factored per layer as in K-FAC, arXiv:1503.05671 §3, and its diagonal taken).

    Attributes:
        pairs: by path, ``(r, c)`` float32 vectors of lengths ``out`` and ``in``; a tied embedding has two pairs.
        input_power: by path, float32 ``(in,)``, mean square of each input feature.
        tokens: number of tokens in the text.
        text: what the text was, in words.
    """

    pairs: dict[str, list[tuple[np.ndarray, np.ndarray]]] = field(default_factory=dict)
    input_power: dict[str, np.ndarray] = field(default_factory=dict)
    tokens: int = 0
    text: str = ""


_TAPS = ["tap_rows", "tap_columns", "head_rows", "head_columns"]


@mx.custom_function
def _tap(y: mx.array, x: mx.array, rows: mx.array, columns: mx.array) -> mx.array:
    """Identity on y, whose "gradients" for rows and columns are Σ_t (∂L/∂y)² and Σ_t x²."""
    return y + mx.zeros((), y.dtype)


@_tap.vjp
def _tap_vjp(primals, cotangent, _):
    _, x, rows, columns = primals
    g = cotangent.astype(mx.float32).reshape(-1, rows.shape[0])
    inputs = x.astype(mx.float32).reshape(-1, columns.shape[0])
    return cotangent, mx.zeros_like(x), mx.square(g).sum(0), mx.square(inputs).sum(0)


@mx.custom_function
def _tap_lookup(y: mx.array, tokens: mx.array, rows: mx.array, columns: mx.array) -> mx.array:
    """The same for an embedding: Σ_t one-hot(token) and Σ_t (∂L/∂y)²."""
    return y + mx.zeros((), y.dtype)


@_tap_lookup.vjp
def _tap_lookup_vjp(primals, cotangent, _):
    _, tokens, rows, columns = primals
    g = cotangent.astype(mx.float32).reshape(-1, columns.shape[0])
    counts = mx.zeros_like(rows).at[tokens.reshape(-1)].add(1.0)
    return cotangent, mx.zeros_like(tokens), counts, mx.square(g).sum(0)


class _TappedLinear(nn.Module):
    """A linear layer that reports what passes through it."""

    def __init__(self, inner: nn.Module, shape: tuple[int, int]) -> None:
        super().__init__()
        self.inner = inner
        self.tap_rows, self.tap_columns = mx.zeros(shape[0]), mx.zeros(shape[1])

    def __call__(self, x: mx.array) -> mx.array:
        return _tap(self.inner(x), mx.stop_gradient(x), self.tap_rows, self.tap_columns)


class _TappedEmbedding(nn.Module):
    """An embedding that reports what passes through it, as lookup and as tied output head."""

    def __init__(self, inner: nn.Module, shape: tuple[int, int]) -> None:
        super().__init__()
        self.inner = inner
        self.tap_rows, self.tap_columns = mx.zeros(shape[0]), mx.zeros(shape[1])
        self.head_rows, self.head_columns = mx.zeros(shape[0]), mx.zeros(shape[1])

    def __call__(self, tokens: mx.array) -> mx.array:
        return _tap_lookup(self.inner(tokens), tokens, self.tap_rows, self.tap_columns)

    def as_linear(self, x: mx.array) -> mx.array:
        return _tap(self.inner.as_linear(x), mx.stop_gradient(x), self.head_rows, self.head_columns)


def calibrate(
    model: nn.Module, shapes: dict[str, tuple[int, int]], batches: list[mx.array], text: str, seed: int = 0
) -> Generator[Progress, None, Calibration]:
    """Run the text through a model once, forward and backward.

    The label of each position is drawn from the model's own prediction, which makes the squared gradient an unbiased
    estimate of the Fisher information (Kunstner et al., arXiv:1905.12558 §3: not the "empirical" one).

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
        return (_TappedEmbedding if hasattr(inner, "as_linear") else _TappedLinear)(inner, shapes[path])

    watched = map_layers(model, list(shapes), tapped)
    watched.freeze()
    for module in watched.modules():
        if isinstance(module, (_TappedLinear, _TappedEmbedding)):
            module.unfreeze(recurse=False, keys=_TAPS)
    key = mx.random.key(seed)

    def score(tokens: mx.array, key: mx.array) -> mx.array:
        logits = watched(tokens).astype(mx.float32)
        drawn = mx.random.categorical(mx.stop_gradient(logits), key=key)
        return -nn.losses.cross_entropy(logits, drawn, reduction="sum")

    grad = nn.value_and_grad(watched, score)
    totals: dict[str, np.ndarray] = {}
    count = 0
    for i, tokens in enumerate(batches):
        key, sub = mx.random.split(key)
        _, found = grad(tokens, sub)
        for name, value in _flat(found):
            totals[name] = totals.get(name, 0) + np.array(value, np.float64)
        count += tokens.size
        yield Progress("predicting ΔKL", i + 1, len(batches))
    return _collect(totals, shapes, count, text)


def _flat(tree: dict) -> list[tuple[str, mx.array]]:
    from mlx.utils import tree_flatten

    flat = tree_flatten(tree)
    mx.eval([value for _, value in flat])
    return flat


def _collect(totals: dict[str, np.ndarray], shapes: dict, count: int, text: str) -> Calibration:
    made = Calibration(tokens=count, text=text)
    for path in shapes:
        for site in ("tap", "head"):
            if f"{path}.{site}_rows" not in totals:
                continue
            rows, columns = ((totals[f"{path}.{site}_{axis}"] / count).astype(np.float32) for axis in ("rows", "columns"))
            if rows.any() and columns.any():
                made.pairs.setdefault(path, []).append((rows, columns))
                is_lookup = site == "tap" and f"{path}.head_rows" in totals
                if not is_lookup:
                    made.input_power[path] = columns
    return made
