"""Error-compensating initializations: adapters that start as a low-rank copy of an error.

The adapter of every layer starts as scale·B·A = U·Uᵀ·E, with the leading directions U of the
quantization error E (``directions.py``). Runs on the MLX thread.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable

import mlx.core as mx

from qlab.core.config.lora import LoRAConfig
from qlab.core.config.spec import LayerSpec
from qlab.core.progress import Progress
from qlab.engine.adapt.activations import Inputs, LayerInputs
from qlab.engine.adapt.directions import WeightOf, directions, error_of


def start(
    lora: LoRAConfig,
    layers: Iterable[LayerSpec],
    original: WeightOf,
    stored: WeightOf,
    groups: Iterable[dict[str, LayerInputs]],
) -> Generator[Progress, None, dict[str, mx.array]]:
    """Compute the trainable arrays of adapters that compensate for the quantization error.

    Args:
        lora: kind, rank, scale, dtype, and the initialization.
        layers: that get adapters.
        original: returns W by path.
        stored: returns Ŵ by path.
        groups: inputs by path, a block at a time; for ``residual`` none are needed. A layer or an
            expert that no text reached starts as without data.

    Yields:
        Progress after each layer.

    Returns:
        Arrays by path, evaluated; scale · B·A is the correction. Where the kind has lengths of
        rows, they are those of W.
    """
    todo = {layer.path: layer for layer in layers}
    count = len(todo)
    arrays: dict[str, mx.array] = {}

    def add(path: str, inputs: LayerInputs | None) -> Progress:
        layer = todo.pop(path)
        error, weight = error_of(path, original, stored)
        of_layer = _arrays(lora, layer, error, weight, inputs)
        for name, array in of_layer.items():
            arrays[f"{path}.{name}"] = array
        done = count - len(todo)
        return Progress("compensating for the quantization error", done, count)

    if lora.init != "residual":
        for group in groups:
            paths = [path for path in todo if path in group]
            for path in paths:
                yield add(path, group[path])
    for path in list(todo):
        yield add(path, None)
    return arrays


def _arrays(
    lora: LoRAConfig,
    layer: LayerSpec,
    error: mx.array,
    weight: mx.array,
    inputs: LayerInputs | None,
) -> dict[str, mx.array]:
    """Return the trainable arrays of one layer by name, evaluated."""
    if layer.kind == "switch":
        by_expert = inputs if isinstance(inputs, dict) else {}
        lefts = []
        rights = []
        for expert, of_expert in enumerate(error):
            left, right = _factors(lora, of_expert, by_expert.get(expert))
            lefts.append(left)
            rights.append(right)
        outer = mx.stack(rights)  # A, (experts, rank, in)
        inner = mx.stack(lefts)  # B, (experts, out, rank)
    else:
        of_layer = None if isinstance(inputs, dict) else inputs
        left, right = _factors(lora, error, of_layer)
        # a linear layer stores factors of its transposed weight, an embedding of the weight itself
        outer = right.T
        inner = left.T
        if layer.kind == "embedding":
            outer = left
            inner = right
    norms = mx.linalg.norm(weight, axis=-1)
    arrays = lora.adapter_kind.compensated(outer, inner, norms)
    dtype = getattr(mx, lora.dtype)
    arrays = {name: array.astype(dtype) for name, array in arrays.items()}
    mx.eval(arrays)
    return arrays


def _factors(lora: LoRAConfig, error: mx.array, inputs: Inputs | None) -> tuple[mx.array, mx.array]:
    """Return the two factors of the best stand-in for an error, the scale divided out.

    Args:
        lora: rank, scale and initialization.
        error: E, float32 ``(out, in)``.
        inputs: of the layer, or None.

    Returns:
        ``(out, rank)`` and ``(rank, in)``.
    """
    out, width = error.shape
    if not mx.any(error).item():
        # nothing to compensate for: no effect at first, and a slope to learn along
        left = mx.zeros((out, lora.rank))
        shape = (lora.rank, width)
        key = mx.random.key(0)
        drawn = mx.random.uniform(-1, 1, shape, key=key)
        return left, drawn * width**-0.5
    vectors, _ = directions(lora.init, error, inputs, lora.rank)
    left = vectors[:, : lora.rank]
    right = left.T @ error
    # both factors get rows of equal length, and the scale is divided out of them
    norms = mx.linalg.norm(right, axis=1)
    lengths = mx.sqrt(mx.maximum(norms, 1e-20))
    part = abs(lora.scale) ** -0.5
    signed = part if lora.scale > 0 else -part
    left = left * lengths * part
    right = right / lengths[:, None] * signed
    return left, right
