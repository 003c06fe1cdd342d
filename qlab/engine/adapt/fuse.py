"""Merges an adapter into the weights of a new model.

Training saw ``f(W + D)``, W being the base as it computes. Merging into W gives that function
again; merging into the original weights W0 gives ``W + D + E`` with the quantization error E that
the adapter never saw. Storing W + D in the codes that W came from rounds a small D away (dead
zone); ``preview.py`` measures how much. Runs on the MLX thread, a layer at a time.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qlab.core.config.lora import LoRAConfig
from qlab.core.config.quant import QuantConfig, stock_config
from qlab.core.config.spec import LayerSpec, ModelSpec
from qlab.core.progress import Progress
from qlab.engine.adapt.parameters import arrays_of, checked, expected
from qlab.engine.models.surgery import module_at, put_module, twin
from qlab.engine.quantize.quantize import quantized_layer
from qlab.errors import ConfigError, WeightsError
from qlab.nn.linear import Packed, is_quantized, weight_of
from qlab.nn.stored import dense_layer

BITS = (16, 8, "base")
ONTO = ("base", "original")
REST = ("base", 16)
_EIGHT_BIT_GROUPS = (64, 32)  # the first that divides the layer's width


def change(
    layer: nn.Module, kind: str, lora: LoRAConfig, arrays: Mapping[str, mx.array]
) -> mx.array:
    """Return D, what an adapter adds to a layer's weight.

    Args:
        layer: the base's layer.
        kind: ``linear``, ``embedding`` or ``switch``.
        lora: what the adapter is; its kind computes D.
        arrays: of the layer, by name.

    Returns:
        ``(…, out, in)`` float32, lazy.

    Raises:
        UnsupportedError: the kind of adapter does not say what it adds.
    """
    wide = {name: array.astype(mx.float32) for name, array in arrays.items()}
    return lora.adapter_kind.change(wide, weight_of(layer, mx.float32), lora, kind)


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
        spec: the base's layers.
        parameters: trainable arrays by path.
        lora: what they are.
        bits: of the adapted layers: 16 (dense, in the model's own dtype), 8 (affine, groups of 64)
            or ``"base"`` (as the base stores them; a small change is rounded away).
        onto: what the change is added to: ``"base"`` (weights that were trained with: the same
            function) or ``"original"`` (before quantization: without its error, but not what was
            trained).
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
    _check_option("bits", bits, BITS)
    _check_option("rest", rest, REST)
    weights = _merged_into(onto, module, original)
    arrays = checked(parameters, expected(spec, lora))
    targets = {layer.path for layer in lora.targets(spec)}
    work = []
    for layer in spec.layers:
        becomes_dense = rest == 16 and is_quantized(module_at(module, layer.path))
        if layer.path in targets or becomes_dense:
            work.append(layer)
    fused = twin(module)
    for number, layer in enumerate(work, 1):
        base = module_at(module, layer.path)
        weight = weight_of(module_at(weights, layer.path), mx.float32)
        storage = None
        if layer.path in targets:
            weight = weight + change(base, layer.kind, lora, arrays_of(arrays, layer.path))
            storage = fused_storage(base, layer, bits)
        put_module(fused, layer.path, _merged(base, layer.path, weight, storage))
        yield Progress("merging the adapter", number, len(work))
    return fused


def _merged_into(onto: str, base: nn.Module, original: nn.Module | None) -> nn.Module:
    """Return the model whose weights the change is added to."""
    _check_option("onto", onto, ONTO)
    if onto == "base":
        return base
    if original is None:
        raise ConfigError(
            "onto='original' needs the model before quantization, and it is not known; "
            "use onto='base'."
        )
    return original


def fused_storage(base: Any, layer: LayerSpec, bits: int | str) -> QuantConfig | None:
    """Return how to store a fused layer; None means dense.

    Args:
        base: the base's layer.
        layer: its spec.
        bits: one of ``BITS``.
    """
    if bits == 8:
        fitting = [group for group in _EIGHT_BIT_GROUPS if layer.shape[-1] % group == 0]
        return QuantConfig("affine", 8, fitting[0]) if fitting else None
    if bits == 16 or not is_quantized(base):
        return None
    if isinstance(base, Packed):
        return base.config
    return stock_config(base.mode, base.bits, base.group_size)


def dense_dtype(base: Any) -> mx.Dtype:
    """Return the dtype that a layer's weight has, or had before it was packed."""
    return base.dtype if isinstance(base, Packed) else weight_of(base).dtype


def _merged(base: Any, path: str, weight: mx.array, storage: QuantConfig | None) -> nn.Module:
    """Return a layer with this weight, evaluated: dense in the base's dtype, or under a config."""
    layer: Any = dense_layer(base, weight.astype(dense_dtype(base)))
    if storage is not None:
        return quantized_layer(layer, path, storage, "rtn", None)
    if not mx.isfinite(layer.weight).all().item():
        raise WeightsError(
            f"The merged weight of {path!r} holds NaN or infinity; no model was made."
        )
    layer.freeze()
    mx.eval(layer.parameters())
    return layer


def _check_option(name: str, value: object, legal: tuple) -> None:
    if isinstance(value, bool) or value not in legal:
        raise ConfigError(
            f"{name}={value!r} is not legal; choose one of {', '.join(map(repr, legal))}."
        )
