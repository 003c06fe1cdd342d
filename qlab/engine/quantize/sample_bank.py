"""The sample bank.

A few random chunks of every layer, evaluated together, so that the cost does not grow with the
model.

A chunk is 128 neighbouring weights of one row (64 or 32 where the width does not divide), which
covers every group size on the shelf up to its length. Knows nothing of tables and text: it turns a
config into errors per chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import mlx.core as mx
import numpy as np

from qlab.core.config.quant import QuantConfig
from qlab.core.config.spec import LayerSpec

WEIGHTS_PER_LAYER = 24576
WIDTHS = (128, 64, 32)


@dataclass
class Stack:
    """Samples of all layers that share a chunk width and a dtype, one after another.

    Attributes:
        columns: columns of the error table that the layers have, ``(L,)``.
        chunks: ``(L·n, width)`` in the layers' dtype.
        rows: int ``(L, n)``, row of its matrix that each chunk was taken from.
        starts: int ``(L, n)``, first input feature of each chunk.
        population: int ``(L,)``, chunks in the whole layer.
        weights: float32 ``(L·n, width)``, importance of each weight's squared error, or None before
            calibration.
    """

    columns: np.ndarray
    chunks: mx.array
    rows: np.ndarray
    starts: np.ndarray
    population: np.ndarray
    weights: mx.array | None = None
    _spans: dict[int, np.ndarray] = field(default_factory=dict)
    _weighted_spans: dict[int, np.ndarray] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Weights in a chunk."""
        return self.chunks.shape[1]

    def sums(self, values: mx.array) -> np.ndarray:
        """Sum each chunk's values; return float64 ``(L, n)``."""
        return np.array(values.sum(1), np.float64).reshape(self.rows.shape)

    @cached_property
    def energy(self) -> np.ndarray:
        """Σw² of each chunk, float64 ``(L, n)``."""
        return self.sums(mx.square(self.chunks.astype(mx.float32)))

    def spans(self, group: int) -> np.ndarray:
        """Sum over each chunk's weights of their group's squared range, float64 ``(L, n)``.

        Group is 32, 64 or 128.
        """
        if group not in self._spans:
            self._spans[group] = self.sums(self._squared_ranges(group))
        return self._spans[group]

    def weighted_spans(self, group: int) -> np.ndarray:
        """The same, each weight counted by its importance."""
        if group not in self._weighted_spans:
            self._weighted_spans[group] = self.sums(self._squared_ranges(group) * self.weights)
        return self._weighted_spans[group]

    def weigh(self, pairs: dict[int, list[tuple[np.ndarray, np.ndarray]]]) -> None:
        """Give every sampled weight its importance Σ_p r_p[row]·c_p[feature].

        NaN in layers without pairs.

        Args:
            pairs: by table column, ``(r, c)`` vectors of lengths ``out`` and ``in``.
        """
        features = self.starts[..., None] + np.arange(self.width)
        made = np.full((*self.rows.shape, self.width), np.nan, np.float32)
        for i, column in enumerate(self.columns):
            if column in pairs:
                made[i] = sum(r[self.rows[i], None] * c[features[i]] for r, c in pairs[column])
        self.weights = mx.array(made.reshape(-1, self.width))
        self._weighted_spans.clear()

    def _squared_ranges(self, group: int) -> mx.array:
        groups = self.chunks.astype(mx.float32).reshape(-1, group)
        span = mx.square(groups.max(1) - groups.min(1))
        return mx.repeat(span, group).reshape(self.chunks.shape)


def gather(
    layers: tuple[LayerSpec, ...],
    weight_of: Callable[[str], mx.array],
    seed: int = 0,
    size: int = WEIGHTS_PER_LAYER,
) -> list[Stack]:
    """Draw the sample, without replacement, the same for one seed; small layers are taken whole.

    Args:
        layers: all layers; those with an obstacle are left out.
        weight_of: returns a layer's weight by path, ``(…, out, in)``, evaluated or lazy.
        seed: of the draw.
        size: weights per layer.
    """
    rng = np.random.default_rng(seed)
    found: dict[tuple, list[tuple]] = {}
    for column, layer in enumerate(layers):
        if layer.obstacle:
            continue
        width = next(w for w in WIDTHS if layer.shape[-1] % w == 0)
        population = layer.size // width
        per_row = layer.shape[-1] // width
        index = np.sort(_draw(rng, population, min(size // width, population)))
        rows = index // per_row
        starts = index % per_row * width
        weight = weight_of(layer.path)
        # by row and column, so that a weight that is not contiguous is not copied whole
        columns = mx.array(starts)[:, None] + mx.arange(width)
        chunks = weight.reshape(-1, weight.shape[-1])[mx.array(rows)[:, None], columns]
        mx.eval(chunks)
        key = (width, str(chunks.dtype), len(index))
        found.setdefault(key, []).append((column, chunks, rows, starts, population))
    stacks = []
    for parts in found.values():
        columns, chunks, rows, starts, population = zip(*parts, strict=True)
        stacks.append(
            Stack(
                np.array(columns),
                mx.concatenate(chunks),
                np.stack(rows),
                np.stack(starts),
                np.array(population),
            )
        )
    mx.eval([stack.chunks for stack in stacks])
    return stacks


def _draw(rng: np.random.Generator, population: int, count: int) -> np.ndarray:
    if population < 64 * count:
        return rng.permutation(population)[:count]
    drawn = rng.permutation(
        np.unique(rng.integers(0, population, 2 * count))
    )  # a large layer is not listed
    return drawn[:count]


@dataclass(frozen=True)
class ChunkErrors:
    """Errors of one config on one stack.

    Attributes:
        squared: float64 ``(L, n)``, Σ(W−Ŵ)² of each chunk.
        weighted: float64 ``(L, n)``, the same weighted by importance, or None before calibration.
        largest: float32 ``(L,)``, largest |W−Ŵ| of each layer's sample.
    """

    squared: np.ndarray
    weighted: np.ndarray | None
    largest: np.ndarray


def evaluate(stack: Stack, config: QuantConfig, amax: np.ndarray) -> ChunkErrors:
    """Round-trip a stack through a config by rounding to nearest.

    Args:
        stack: the sample; its width is a multiple of the group size.
        config: the storage.
        amax: ``(L,)``, largest magnitude of each whole layer; NaN takes that of its sample.
    """
    weight = stack.chunks.astype(mx.float32)
    seen = np.array(mx.abs(weight).reshape(len(stack.columns), -1).max(1))
    amax = np.where(np.isnan(amax), seen, amax).astype(np.float32)
    per_chunk = mx.array(np.repeat(amax, stack.rows.shape[1]))[:, None]
    stored = config.scheme.roundtrip(stack.chunks, config, mx.float32, per_chunk)
    error = stored - weight
    squared = mx.square(error)
    largest = mx.abs(error).reshape(len(stack.columns), -1).max(1)
    mx.eval(squared, largest)
    weighted = None if stack.weights is None else stack.sums(squared * stack.weights)
    return ChunkErrors(stack.sums(squared), weighted, np.array(largest))
