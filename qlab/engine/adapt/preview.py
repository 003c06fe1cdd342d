"""Measures how much of an adapter a fuse would retain, for every target, without making a model.

``Adapter.preview`` calls it. Runs on the MLX thread, a layer at a time.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from qlab.core.adapt.retention import LayerRetention, RetentionReport
from qlab.core.config.lora import LoRAConfig
from qlab.core.config.quant import QuantConfig
from qlab.core.config.spec import LayerSpec, ModelSpec
from qlab.core.progress import Progress
from qlab.engine.adapt.fuse import change, dense_dtype, fused_storage
from qlab.engine.adapt.parameters import arrays_of, checked, expected
from qlab.engine.models.surgery import module_at
from qlab.nn.linear import weight_of
from qlab.ops.sums import stable_norm

_SAMPLE = 2**20  # weights of a layer from which on a sample of its rows speaks for all


def preview(
    module: nn.Module,
    spec: ModelSpec,
    parameters: Mapping[str, mx.array],
    lora: LoRAConfig,
    original: nn.Module | None = None,
    exact: bool = False,
) -> Generator[Progress, None, RetentionReport]:
    """Measure how much of an adapter a fuse retains, for every target; no model is made.

    Rows are rounded apart, so some of a large layer's rows speak for all.

    Args:
        module: the base.
        spec: the base's layers.
        parameters: trainable arrays by path.
        lora: what they are.
        original: the model before quantization, if it is known.
        exact: whether to look at every row of large layers too.

    Yields:
        Progress after each layer.

    Raises:
        ConfigError: these are not the adapter's parameters.
        WeightsError: a number is NaN or infinite.
        UnsupportedError: the kind of adapter cannot be fused.
    """
    arrays = checked(parameters, expected(spec, lora))
    targets = lora.targets(spec)
    layers = []
    for number, layer in enumerate(targets, 1):
        base = module_at(module, layer.path)
        delta = change(base, layer.kind, lora, arrays_of(arrays, layer.path))
        before = None if original is None else module_at(original, layer.path)
        layers.append(_retention(base, layer, delta, before, exact))
        yield Progress("measuring what a fuse retains", number, len(targets))
    return RetentionReport(spec.name, f"{lora.kind} r{lora.rank}", tuple(layers))


class _Share(NamedTuple):
    """What one storage retains.

    Attributes:
        whole: ρ = ⟨Q(W+D) − Q(W), D⟩/‖D‖².
        changed: share of codes that D changes; NaN without codes.
        by_expert: ρ of every changed expert; of other layers one number.
    """

    whole: float
    changed: float
    by_expert: np.ndarray


class _Rows(NamedTuple):
    """Rows of a layer that are looked at.

    Attributes:
        index: int32 ``(n,)`` among all rows of all experts.
        expert: ``(n,)``, the expert of each row; 0 where there are none.
        is_sample: whether there are more.
    """

    index: mx.array
    expert: np.ndarray
    is_sample: bool

    def of(self, weight: mx.array) -> mx.array:
        """Return these rows of a weight ``(…, out, in)``, as ``(n, in)``."""
        return weight.reshape(-1, weight.shape[-1])[self.index]


def _rows(layer: LayerSpec, exact: bool) -> _Rows:
    count = math.prod(layer.shape[:-1])
    is_sample = not exact and layer.size > _SAMPLE
    rows = np.arange(count)
    if is_sample:
        few = max(_SAMPLE // layer.shape[-1], 1)
        rows = np.linspace(0, count - 1, few).round().astype(int)
    return _Rows(mx.array(rows.astype(np.int32)), rows // layer.shape[-2], is_sample)


def _retention(
    base: nn.Module, layer: LayerSpec, delta: mx.array, original: nn.Module | None, exact: bool
) -> LayerRetention:
    rows = _rows(layer, exact)
    weight = rows.of(weight_of(base, mx.float32))
    delta = rows.of(delta)
    mx.eval(weight, delta)
    norm = _norm(delta)
    if not norm:
        return _unchanged(layer, rows)
    size = _norm(weight)
    dtype = dense_dtype(base)
    storage = fused_storage(base, layer, "base")
    dense = _share(weight, delta, None, dtype, rows.expert)
    eight = _share(weight, delta, fused_storage(base, layer, 8), dtype, rows.expert)
    same = dense
    if storage is not None:
        same = _share(weight, delta, storage, dtype, rows.expert)
    error = math.nan
    from_original = math.nan
    if original is not None and storage is not None:
        before = rows.of(weight_of(original, mx.float32))
        error = _norm(before - weight) / norm
        from_original = _share(before, delta, storage, dtype, rows.expert).whole
    count = math.prod(layer.shape[:-1])
    return LayerRetention(
        path=layer.path,
        stored=layer.storage_label,
        delta_norm=norm * math.sqrt(count / weight.shape[0]),
        relative_size=norm / size if size else math.inf,
        error_ratio=error,
        kept_16=dense.whole,
        kept_8=eight.whole,
        kept_base=same.whole,
        kept_base_from_original=from_original,
        codes_changed=same.changed,
        depth=_depth(rows),
        kept_base_least=float(same.by_expert.min()) if layer.kind == "switch" else math.nan,
    )


def _unchanged(layer: LayerSpec, rows: _Rows) -> LayerRetention:
    """Return the row of a layer whose adapter adds nothing: there is nothing to retain."""
    return LayerRetention(
        path=layer.path,
        stored=layer.storage_label,
        delta_norm=0.0,
        relative_size=0.0,
        error_ratio=math.nan,
        kept_16=math.nan,
        kept_8=math.nan,
        kept_base=math.nan,
        kept_base_from_original=math.nan,
        codes_changed=math.nan,
        depth=_depth(rows),
    )


def _depth(rows: _Rows) -> str:
    return "sampled" if rows.is_sample else "exact"


def _share(
    weight: mx.array,
    delta: mx.array,
    storage: QuantConfig | None,
    dtype: mx.Dtype,
    expert: np.ndarray,
) -> _Share:
    """Return what a storage retains of a change.

    Args:
        weight: W, float32 ``(n, in)``.
        delta: D, float32 ``(n, in)``.
        storage: Q; None for dense weights.
        dtype: of dense weights, and of what is quantized.
        expert: ``(n,)``, the expert of each row.
    """
    before = weight.astype(dtype)
    after = (weight + delta).astype(dtype)
    changed = math.nan
    if storage is not None:
        scheme = storage.scheme
        packed_before = scheme.quantize(before, storage)
        packed_after = scheme.quantize(after, storage)
        before = scheme.dequantize(packed_before, storage, mx.float32)
        after = scheme.dequantize(packed_after, storage, mx.float32)
        mx.eval(before, after, packed_before, packed_after)
        changed = _differing(packed_before["weight"], packed_after["weight"], storage.bits)
    moved = after.astype(mx.float32) - before.astype(mx.float32)
    left = np.bincount(expert, np.array((moved * delta).sum(-1), np.float64))
    whole = np.bincount(expert, np.array((delta * delta).sum(-1), np.float64))
    is_changed = whole > 0
    return _Share(float(left.sum() / whole.sum()), changed, left[is_changed] / whole[is_changed])


def _differing(a: mx.array, b: mx.array, bits: int) -> float:
    """Return the share of codes that differ between two packed weights.

    Args:
        a: streams of codes, lowest bit first.
        b: the same of another weight.
        bits: of a code.
    """
    flips = np.array(a).reshape(-1).view(np.uint8) ^ np.array(b).reshape(-1).view(np.uint8)
    codes = np.unpackbits(flips, bitorder="little").reshape(-1, bits)
    differs = codes[:, 0]
    for bit in range(1, bits):  # many times quicker than any(1)
        differs = differs | codes[:, bit]
    return int(np.count_nonzero(differs)) / len(codes)


def _norm(array: mx.array) -> float:
    norm: Any = stable_norm(array).item()
    return norm
