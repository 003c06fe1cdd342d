"""Random samples of every layer's weights, so that an error estimate costs the same for any model.

``draw_samples`` takes about 24,000 weights of each layer once. ``roundtrip_errors`` then quantizes
and dequantizes a whole ``SampleStack`` (the samples of many layers) in one go and returns the
errors chunk by chunk; ``table_filler`` turns those into rows of the error table.

A *chunk* is 128 neighbouring weights of one row of a matrix (64 or 32 where the row's length is not
a multiple of 128). It covers every group size on the shelf up to its own length.

Shapes: L layers in a stack, n chunks from each layer, ``width`` weights in a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import mlx.core as mx
import numpy as np

from qlab.core.config.quant import QuantConfig
from qlab.core.config.spec import LayerSpec
from qlab.engine.quantize.moments import ImportancePairs

WEIGHTS_PER_LAYER = 24576
WIDTHS = (128, 64, 32)
# A population this many times the sample is not listed to draw from it.
_LISTED_AT_MOST = 64


@dataclass(kw_only=True)
class SampleStack:
    """Samples of all layers that share a chunk width and a dtype, one layer after another.

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
        """Sum ``(L·n, width)`` values within each chunk; return float64 ``(L, n)``."""
        of_chunks = np.array(values.sum(1), np.float64)
        return of_chunks.reshape(self.rows.shape)

    def largest(self, values: mx.array) -> np.ndarray:
        """Return the largest of ``(L·n, width)`` values of each layer, ``(L,)``."""
        layers = len(self.columns)
        by_layer = values.reshape(layers, -1)
        return np.array(by_layer.max(1))

    @cached_property
    def energy(self) -> np.ndarray:
        """Σw² of each chunk, float64 ``(L, n)``."""
        chunks = self.chunks.astype(mx.float32)
        return self.sums(mx.square(chunks))

    def spans(self, group: int) -> np.ndarray:
        """Return Σ over each chunk's weights of their group's squared range, float64 ``(L, n)``.

        Args:
            group: 32, 64 or 128 weights.
        """
        if group not in self._spans:
            ranges = self._squared_ranges(group)
            self._spans[group] = self.sums(ranges)
        return self._spans[group]

    def weighted_spans(self, group: int) -> np.ndarray:
        """Return the same as ``spans``, each weight counted by its importance.

        ``set_importance`` comes first.
        """
        assert self.weights is not None, "set_importance comes first"
        if group not in self._weighted_spans:
            ranges = self._squared_ranges(group)
            weighted = ranges * self.weights
            self._weighted_spans[group] = self.sums(weighted)
        return self._weighted_spans[group]

    def set_importance(self, pairs: Mapping[int, ImportancePairs]) -> None:
        """Give every sampled weight its importance Σ_p r_p[row]·c_p[feature].

        Layers without pairs get NaN, so that nothing is predicted of them.

        Args:
            pairs: by table column, ``(r, c)`` vectors of lengths ``out`` and ``in``.
        """
        # (L, n, width): input feature of every sampled weight
        within_chunk = np.arange(self.width)
        features = self.starts[..., None] + within_chunk
        importance = np.full(features.shape, np.nan, np.float32)
        for i, column in enumerate(self.columns):
            if column not in pairs:
                continue
            rows = self.rows[i]
            products = []
            for r, c in pairs[column]:
                of_row = r[rows, None]  # (n, 1)
                of_feature = c[features[i]]  # (n, width)
                products.append(of_row * of_feature)
            importance[i] = sum(products)
        by_chunk = importance.reshape(-1, self.width)
        self.weights = mx.array(by_chunk)
        self._weighted_spans.clear()

    def _squared_ranges(self, group: int) -> mx.array:
        """(max − min)² of each weight's group, ``(L·n, width)``."""
        chunks = self.chunks.astype(mx.float32)
        groups = chunks.reshape(-1, group)
        ranges = groups.max(1) - groups.min(1)
        squared = mx.square(ranges)
        of_weights = mx.repeat(squared, group)
        return of_weights.reshape(self.chunks.shape)


@dataclass(frozen=True, kw_only=True)
class _LayerSample:
    """Chunks of one layer: what ``SampleStack`` holds of it."""

    column: int
    chunks: mx.array  # (n, width)
    rows: np.ndarray  # (n,)
    starts: np.ndarray  # (n,)
    population: int


_Alike = tuple[int, str, int]  # width, dtype and number of the chunks of a layer


def draw_samples(
    layers: Sequence[LayerSpec],
    weight_of: Callable[[str], mx.array],
    seed: int = 0,
    size: int = WEIGHTS_PER_LAYER,
) -> list[SampleStack]:
    """Draw chunks of every layer without replacement; a layer smaller than ``size`` is taken whole.

    The same seed draws the same chunks.

    Args:
        layers: all layers; those with an obstacle are left out.
        weight_of: returns a layer's weight by path, ``(…, out, in)``, evaluated or lazy.
        seed: of the draw.
        size: weights per layer.
    """
    rng = np.random.default_rng(seed)
    alike: dict[_Alike, list[_LayerSample]] = {}
    for column, layer in enumerate(layers):
        if layer.obstacle:
            continue
        # no name for the weight here: it would stay in memory while the next one is read
        sample = _draw_layer(rng, column, layer, weight_of(layer.path), size)
        count, width = sample.chunks.shape
        dtype = str(sample.chunks.dtype)
        samples = alike.setdefault((width, dtype, count), [])
        samples.append(sample)
    stacks = [_stacked(samples) for samples in alike.values()]
    mx.eval([stack.chunks for stack in stacks])
    return stacks


def _draw_layer(
    rng: np.random.Generator, column: int, layer: LayerSpec, weight: mx.array, size: int
) -> _LayerSample:
    features = layer.shape[-1]
    widths = (width for width in WIDTHS if features % width == 0)
    width = next(widths)
    population = layer.size // width
    count = min(size // width, population)
    index = np.sort(_draw(rng, population, count))
    chunks_per_row = features // width
    rows = index // chunks_per_row
    starts = index % chunks_per_row * width
    # Taken by row and column: to take chunks of a reshaped weight would copy it whole where it is
    # not contiguous.
    start_in_row = mx.array(starts)[:, None]
    within_row = start_in_row + mx.arange(width)  # (n, width)
    matrix = weight.reshape(-1, features)
    row_of_chunk = mx.array(rows)[:, None]
    chunks = matrix[row_of_chunk, within_row]
    mx.eval(chunks)
    return _LayerSample(
        column=column, chunks=chunks, rows=rows, starts=starts, population=population
    )


def _draw(rng: np.random.Generator, population: int, count: int) -> np.ndarray:
    """Return ``count`` different numbers below ``population``, in random order."""
    if population < _LISTED_AT_MOST * count:
        return rng.permutation(population)[:count]
    # Twice as many are drawn, so that enough different ones are left.
    drawn = rng.integers(0, population, 2 * count)
    different = np.unique(drawn)
    return rng.permutation(different)[:count]


def _stacked(samples: list[_LayerSample]) -> SampleStack:
    return SampleStack(
        columns=np.array([sample.column for sample in samples]),
        chunks=mx.concatenate([sample.chunks for sample in samples]),
        rows=np.stack([sample.rows for sample in samples]),
        starts=np.stack([sample.starts for sample in samples]),
        population=np.array([sample.population for sample in samples]),
    )


@dataclass(frozen=True, kw_only=True)
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


def roundtrip_errors(stack: SampleStack, config: QuantConfig, amax: np.ndarray) -> ChunkErrors:
    """Quantize and dequantize a stack by rounding to nearest, and return its errors.

    Args:
        stack: the sample; its width is a multiple of the group size.
        config: the storage.
        amax: ``(L,)``, largest magnitude of each whole layer; NaN takes that of its sample.
    """
    weight = stack.chunks.astype(mx.float32)
    largest_sampled = stack.largest(mx.abs(weight))
    is_unknown = np.isnan(amax)
    amax = np.where(is_unknown, largest_sampled, amax)
    # (L·n, 1): formats with one scale for a whole tensor need the tensor's largest magnitude
    chunks_of_layer = stack.rows.shape[1]
    by_chunk = np.repeat(amax.astype(np.float32), chunks_of_layer)
    amax_of_chunk = mx.array(by_chunk)[:, None]
    roundtrip = config.scheme.roundtrip
    dequantized = roundtrip(stack.chunks, config, mx.float32, amax_of_chunk)
    error = dequantized - weight
    squared = mx.square(error)
    largest = stack.largest(mx.abs(error))
    weighted = None
    if stack.weights is not None:
        weighted = stack.sums(squared * stack.weights)
    return ChunkErrors(squared=stack.sums(squared), weighted=weighted, largest=largest)
