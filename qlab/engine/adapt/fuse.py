"""Merges an adapter into the weights, and says beforehand how much of it will survive.

Training saw ``f(W + D)``, W being the base as it computes. Merging into W gives that function
again; merging into the original weights W0 gives ``W + D + E`` with the quantization error E that
the adapter never saw. Storing W + D in the codes that W came from rounds a small D away (dead
zone). Runs on the MLX thread, a layer at a time.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from qlab.core.adapt.retention import LayerSurvival, Survival
from qlab.core.config.lora import LoRAConfig
from qlab.core.config.quant import QuantConfig, stock_config
from qlab.core.config.spec import LayerSpec, ModelSpec
from qlab.core.progress import Progress
from qlab.engine.adapt.parameters import checked, expected
from qlab.engine.models.surgery import module_at, put_module, twin
from qlab.engine.quantize.quantize import quantized_layer
from qlab.errors import ConfigError, UnsupportedError, WeightsError
from qlab.nn.linear import Packed, is_quantized, weight_of
from qlab.nn.stored import dense_layer

BITS = (16, 8, "base")
ONTO = ("base", "original")
_EIGHT_GROUPS = (64, 32)
_SAMPLE = 2**20  # weights of a layer from which on a preview looks at a sample of its rows


def change(layer: nn.Module, kind: str, lora: LoRAConfig, own: Mapping[str, mx.array]) -> mx.array:
    """Return D, what an adapter adds to a layer's weight.

    LoRA: ``scale · B·A``. DoRA: ``m · (W + scale·BA) / ‖W + scale·BA‖ − W``, row by row
    (arXiv:2402.09353, equation 5).

    Args:
        layer: the base's layer.
        kind: ``linear``, ``embedding`` or ``switch``.
        lora: what the adapter is.
        own: its arrays by name.

    Returns:
        ``(…, out, in)`` float32, lazy.

    Raises:
        UnsupportedError: the kind of adapter has no known change of the weight.
    """
    if lora.kind not in ("lora", "dora"):
        raise UnsupportedError(
            f"kind={lora.kind!r} cannot be fused: it does not say what it adds to the weight."
        )
    a, b = (own[name].astype(mx.float32) for name in ("lora_a", "lora_b"))
    delta = lora.scale * (
        b @ a if kind == "switch" else a @ b if kind == "embedding" else (a @ b).T
    )
    if lora.kind == "lora":
        return delta
    weight = weight_of(layer, mx.float32)
    whole = weight + delta
    norm = mx.sqrt(mx.maximum(mx.square(whole).sum(-1, keepdims=True), 1e-20))
    return own["m"].astype(mx.float32)[..., None] * whole / norm - weight


def fuse(
    module: nn.Module,
    spec: ModelSpec,
    parameters: Mapping[str, mx.array],
    lora: LoRAConfig,
    bits: int | str = 16,
    onto: str = "base",
    original: nn.Module | None = None,
    rest: int | str = "base",
) -> Generator[Progress, None, nn.Module]:
    """Merge an adapter into a new model, which shares everything else with the base.

    Args:
        module: the base; it is not changed.
        spec: its layers.
        parameters: trainable arrays by path.
        lora: what they are.
        bits: of the adapted layers: 16 (dense, in the model's own dtype), 8 (affine, groups of 64)
            or ``"base"`` (stored as the base stores them; a small change does not survive that, see
            ``preview``).
        onto: what the change is added to: ``"base"`` (the weights that were trained with: the same
            function) or ``"original"`` (the weights before quantization: without its error, but not
            what was trained).
        original: the model before quantization; needed for ``"original"``.
        rest: layers without adapter: ``"base"`` (as they are) or 16 (dense too; from the original
            with ``onto="original"``).

    Yields:
        Progress after each layer.

    Returns:
        The model, evaluated; ``engine.io.save.save`` writes it.

    Raises:
        ConfigError: an option is not legal, or these are not the adapter's parameters.
        WeightsError: a number is NaN or infinite.
        UnsupportedError: the kind of adapter cannot be fused.
    """
    _legal("bits", bits, BITS)
    _legal("onto", onto, ONTO)
    _legal("rest", rest, ("base", 16))
    if onto == "original" and original is None:
        raise ConfigError(
            "onto='original' needs the model before quantization, and it is not known; use onto='base'."
        )
    arrays = checked(parameters, expected(spec, lora))
    targets = {layer.path for layer in lora.targets(spec)}
    dense = {
        layer.path
        for layer in spec.layers
        if rest == 16 and is_quantized(module_at(module, layer.path))
    }
    work = [layer for layer in spec.layers if layer.path in targets | dense]
    made = twin(module)
    for n, layer in enumerate(work):
        base = module_at(module, layer.path)
        weight = weight_of(
            module_at(original, layer.path) if onto == "original" else base, mx.float32
        )
        if layer.path in targets:
            weight = weight + change(base, layer.kind, lora, _own(arrays, layer.path))
        config = _storage(base, layer, bits) if layer.path in targets else None
        put_module(made, layer.path, _stored(base, layer.path, weight, config))
        yield Progress("merging the adapter", n + 1, len(work))
    return made


def _stored(base: nn.Module, path: str, weight: mx.array, config: QuantConfig | None) -> nn.Module:
    """Return a layer with this weight, evaluated: dense in the base's dtype, or under a config."""
    made = dense_layer(base, weight.astype(_dtype(base)))
    if config is not None:
        return quantized_layer(made, path, config, "rtn", None)
    if not mx.isfinite(made.weight).all().item():
        raise WeightsError(
            f"The merged weight of {path!r} holds NaN or infinity; no model was made."
        )
    made.freeze()
    mx.eval(made.parameters())
    return made


def preview(
    module: nn.Module,
    spec: ModelSpec,
    parameters: Mapping[str, mx.array],
    lora: LoRAConfig,
    original: nn.Module | None = None,
    exact: bool = False,
) -> Generator[Progress, None, Survival]:
    """Measure how much of an adapter survives a fuse, for every target; no model is made.

    Rows are rounded apart, so some of a large layer's rows speak for all.

    Args:
        module: the base.
        spec: its layers.
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
    found = []
    for n, layer in enumerate(targets):
        base = module_at(module, layer.path)
        delta = change(base, layer.kind, lora, _own(arrays, layer.path))
        first = None if original is None else module_at(original, layer.path)
        found.append(_survival(base, layer, delta, first, exact))
        yield Progress("measuring what survives", n + 1, len(targets))
    return Survival(spec.name, f"{lora.kind} r{lora.rank}", tuple(found))


def _survival(
    base: nn.Module, layer: LayerSpec, delta: mx.array, original: nn.Module | None, exact: bool
) -> LayerSurvival:
    dtype = _dtype(base)
    config = _storage(base, layer, "base")
    eight = _storage(base, layer, 8)
    count = math.prod(layer.shape[:-1])
    few = not exact and layer.size > _SAMPLE
    rows = (
        np.linspace(0, count - 1, max(_SAMPLE // layer.shape[-1], 1)).round().astype(int)
        if few
        else np.arange(count)
    )
    expert = rows // layer.shape[-2]
    rows = mx.array(rows.astype(np.int32))
    weight, delta = (x.reshape(count, -1)[rows] for x in (weight_of(base, mx.float32), delta))
    mx.eval(weight, delta)
    size = _norm(weight)
    norm = _norm(delta)
    depth = "sampled" if few else "exact"
    if not norm:
        return LayerSurvival(layer.path, layer.storage_label, 0.0, 0.0, *(math.nan,) * 6, depth)
    kept_16, _, of_experts = _kept(weight, delta, None, dtype, expert)
    kept_8, *_ = _kept(weight, delta, eight, dtype, expert)
    kept_base, changed, of_experts = (
        _kept(weight, delta, config, dtype, expert) if config else (kept_16, math.nan, of_experts)
    )
    error = math.nan
    from_original = math.nan
    if original is not None and config is not None:
        first = weight_of(original, mx.float32).reshape(count, -1)[rows]
        error = _norm(first - weight) / norm
        from_original, *_ = _kept(first, delta, config, dtype, expert)
    return LayerSurvival(
        path=layer.path,
        stored=layer.storage_label,
        delta_norm=norm * math.sqrt(count / weight.shape[0]),
        relative_size=norm / size if size else math.inf,
        error_ratio=error,
        kept_16=kept_16,
        kept_8=kept_8,
        kept_base=kept_base,
        kept_base_from_original=from_original,
        codes_changed=changed,
        depth=depth,
        kept_base_least=float(of_experts.min()) if layer.kind == "switch" else math.nan,
    )


def _kept(
    weight: mx.array,
    delta: mx.array,
    config: QuantConfig | None,
    dtype: mx.Dtype,
    expert: np.ndarray,
) -> tuple[float, float, np.ndarray]:
    """Return ρ = ⟨Q(W+D) − Q(W), D⟩/‖D‖², the share of codes that differ (NaN without codes), and ρ
    of every changed expert.
    """
    before = weight.astype(dtype)
    after = (weight + delta).astype(dtype)
    changed = math.nan
    if config is not None:
        packed = [config.scheme.quantize(w, config) for w in (before, after)]
        before, after = (config.scheme.dequantize(p, config, mx.float32) for p in packed)
        mx.eval(before, after, packed)
        changed = _differing(packed[0]["weight"], packed[1]["weight"], config.bits)
    moved = after.astype(mx.float32) - before.astype(mx.float32)
    left, whole = (
        np.bincount(expert, np.array((x * delta).sum(-1), np.float64)) for x in (moved, delta)
    )
    return float(left.sum() / whole.sum()), changed, left[whole > 0] / whole[whole > 0]


def _differing(a: mx.array, b: mx.array, bits: int) -> float:
    """Share of codes that differ between two packed weights: streams of so many bits, lowest first."""
    flips = np.array(a).reshape(-1).view(np.uint8) ^ np.array(b).reshape(-1).view(np.uint8)
    codes = np.unpackbits(flips, bitorder="little").reshape(-1, bits)
    found = codes[:, 0]
    for bit in range(1, bits):  # many times quicker than any(1)
        found = found | codes[:, bit]
    return int(np.count_nonzero(found)) / len(codes)


def _norm(array: mx.array) -> float:
    return mx.sqrt(mx.square(array).sum()).item()


def _own(arrays: Mapping[str, mx.array], path: str) -> dict[str, mx.array]:
    return {
        key.rpartition(".")[2]: array
        for key, array in arrays.items()
        if key.rpartition(".")[0] == path
    }


def _dtype(base: nn.Module) -> mx.Dtype:
    """The dtype that the weight has, or had before it was packed."""
    return base.dtype if isinstance(base, Packed) else weight_of(base).dtype


def _storage(base: nn.Module, layer: LayerSpec, bits: int | str) -> QuantConfig | None:
    """How to store a fused layer; None means dense."""
    if bits == 8:
        fitting = [group for group in _EIGHT_GROUPS if layer.shape[-1] % group == 0]
        return QuantConfig("affine", 8, fitting[0]) if fitting else None
    if bits == 16 or not is_quantized(base):
        return None
    if isinstance(base, Packed):
        return base.config
    return stock_config(base.mode, base.bits, base.group_size)


def _legal(name: str, value: object, legal: tuple) -> None:
    if isinstance(value, bool) or value not in legal:
        raise ConfigError(
            f"{name}={value!r} is not legal; choose one of {', '.join(map(repr, legal))}."
        )
