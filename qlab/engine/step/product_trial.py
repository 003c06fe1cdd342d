"""Which product of the frozen base is fastest here: tried on the model's own layers, remembered.

A quantized weight can be multiplied by MLX's quantized kernel, or dequantized and multiplied as a
dense one. Which is faster depends on shape, storage, number of tokens and device; the gradients are
the same. Called when a run is set up; results are kept in the user's cache folder.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from qlab.core.config.quant import QuantConfig
from qlab.core.config.spec import LayerSpec, ModelSpec
from qlab.engine.models.surgery import module_at
from qlab.nn.frozen import Compute, Frozen, usual_compute
from qlab.ops.sums import stable_norm
from qlab.runtime import blas
from qlab.runtime.atomic import write_file
from qlab.runtime.device import backend
from qlab.runtime.paths import cache_folder

_BUDGET_S = 2.0  # of all trials of a run together
_REPEATS = 3
_FEW = 32  # tokens of a first, short trial
_HOPELESS = 3.0  # times slower in the short trial: not tried at full length
# relative distance of results beyond which a kernel is taken to be wrong, and not used
_TOLERANCE = 0.05
# a kernel must be faster by this factor: dequantizing once serves the backward pass, too
_NOISE = 1.05
_FILE = "products.json"


class _Kind(NamedTuple):
    """Layers whose products take the same time.

    Attributes:
        shape: of the weight, ``(out, in)``.
        storage: how it is stored.
    """

    shape: tuple[int, ...]
    storage: QuantConfig


class Race(NamedTuple):
    """Seconds of a product and its gradient.

    Attributes:
        kernel: by MLX's quantized kernel; infinite if its results are wrong.
        dequantized: from the dequantized weight.
        extrapolated: whether the kernel was tried on few tokens only.
    """

    kernel: float
    dequantized: float
    extrapolated: bool


def choose_compute(
    module: nn.Module, spec: ModelSpec, tokens: int
) -> tuple[Compute, tuple[str, ...]]:
    """Return how the frozen layers of a model are computed fastest, and why, in a line.

    Runs on the MLX thread. Takes about two seconds at most, and none if the same products were
    tried before on this device with this MLX.

    Args:
        module: the model, its arrays in memory; it is not changed.
        spec: the model's layers.
        tokens: that pass the model at once.

    Returns:
        How to compute; no line, or one for a user to read.
    """
    dtype = usual_compute().dtype
    kinds = _layers_by_kind(spec)
    with_kernel = {
        kind: layers
        for kind, layers in kinds.items()
        if isinstance(module_at(module, layers[0].path), nn.QuantizedLinear)
    }
    if not kinds:
        return Compute(dtype, True), ()
    if not with_kernel:
        return Compute(dtype, True), (
            "product of the base: dequantized, the storage has no kernel",
        )
    races, tried = _races(module, with_kernel, tokens, dtype)
    if any(math.isinf(race.kernel) for race in races.values()):
        return Compute(dtype, True), (
            "product of the base: dequantized, for MLX's kernel gives other numbers here",
        )
    by_kernel = 0.0
    dequantized = 0.0
    for kind, race in races.items():
        count = len(with_kernel[kind])
        by_kernel += race.kernel * count
        dequantized += race.dequantized * count
    dequantize = not by_kernel * _NOISE < dequantized
    fast, slow = sorted((by_kernel, dequantized))
    ratio = slow / max(fast, 1e-12)
    at_least = any(race.extrapolated for race in races.values())
    note = _note(dequantize, dtype, ratio, at_least, tokens, tried)
    return Compute(dtype, dequantize), (note,)


def _note(
    dequantize: bool,
    dtype: mx.Dtype | None,
    ratio: float,
    at_least: bool,
    tokens: int,
    tried: int,
) -> str:
    names = ["by kernel", "dequantized"]
    if dequantize:
        names.reverse()
    faster, slower = names
    width = f", in {str(dtype).removeprefix('mlx.core.')}" if dtype else ""
    more = "at least " if at_least else ""
    how = f"{tried} tried now" if tried else "remembered"
    return (
        f"product of the base: {faster}{width}, {more}{ratio:.1f} times as fast as {slower} "
        f"at {_bucket(tokens)} tokens ({how})"
    )


def _layers_by_kind(spec: ModelSpec) -> dict[_Kind, list[LayerSpec]]:
    """Return the quantized linear layers of the blocks by shape and storage."""
    kinds: dict[_Kind, list[LayerSpec]] = {}
    for layer in spec.layers:
        if layer.kind == "linear" and layer.block is not None and layer.storage:
            kinds.setdefault(_Kind(layer.shape, layer.storage), []).append(layer)
    return kinds


def _races(
    module: nn.Module, kinds: dict[_Kind, list[LayerSpec]], tokens: int, dtype: mx.Dtype | None
) -> tuple[dict[_Kind, Race], int]:
    """Return the race of each kind, and how many were run now; the others were remembered."""
    known = _read()
    races = {}
    tried = 0
    count = _bucket(tokens)
    for kind, layers in kinds.items():
        key = _key(kind, count, dtype)
        if not _is_race(known.get(key)):
            layer = module_at(module, layers[0].path)
            known[key] = list(_race(layer, kind.shape, count, dtype, _BUDGET_S / len(kinds)))
            tried += 1
        races[kind] = Race(*known[key])
    if tried:
        _write({key: entry for key, entry in known.items() if _is_race(entry)})
    return races, tried


def _race(
    layer: nn.Module, shape: tuple[int, ...], tokens: int, dtype: mx.Dtype | None, budget_s: float
) -> Race:
    """Time a product and its gradient by kernel and dequantized.

    A kernel that is hopeless on few tokens is extrapolated, one that is wrong never ends.

    Args:
        layer: quantized.
        shape: of its weight, ``(out, in)``.
        tokens: that pass it at once.
        dtype: of the activations; None takes the scales'.
        budget_s: for all of it.
    """
    x_dtype = _activation_dtype(layer, dtype)
    if not _agree(layer, shape, dtype, x_dtype):
        return Race(math.inf, 0.0, False)
    kernel = _product(Frozen(layer, dtype, dequantize=False), shape, x_dtype)
    dequantized = _product(Frozen(layer, dtype, dequantize=True), shape, x_dtype)
    few = min(_FEW, tokens)
    kernel(few)
    dequantized(few)
    end = time.perf_counter() + budget_s
    short = Race(_median(kernel, few, end), _median(dequantized, few, end), False)
    if tokens == few:
        return short
    # a kernel's time grows with the tokens; dequantizing does not, so only the kernel can be
    # hopeless
    if short.kernel > _HOPELESS * short.dequantized:
        return Race(short.kernel * tokens / few, _median(dequantized, tokens, end), True)
    return Race(_median(kernel, tokens, end), _median(dequantized, tokens, end), False)


def _activation_dtype(layer: Any, dtype: mx.Dtype | None) -> mx.Dtype:
    """Return the dtype given, else that of the scales, else (these are codes) bfloat16."""
    wanted = dtype or layer.scales.dtype
    return wanted if mx.issubdtype(wanted, mx.floating) else mx.bfloat16


def _agree(
    layer: nn.Module, shape: tuple[int, ...], dtype: mx.Dtype | None, x_dtype: mx.Dtype
) -> bool:
    """Whether the kernel multiplies by the weights that are stored.

    On CUDA MLX 0.32.4 was seen not to, in float32.
    """
    key = mx.random.key(0)
    x = mx.random.normal((_FEW, shape[-1]), key=key).astype(x_dtype)
    kernel = Frozen(layer, dtype, dequantize=False)(x).astype(mx.float32)
    dense = Frozen(layer, dtype, dequantize=True)(x).astype(mx.float32)
    distance = stable_norm(kernel - dense)
    return bool((distance <= _TOLERANCE * stable_norm(dense)).item())


def _product(layer: Frozen, shape: tuple[int, ...], dtype: mx.Dtype) -> Callable[[int], None]:
    """Return a function that makes the product of so many tokens, and its gradient by them."""

    def run(tokens: int) -> None:
        x = mx.ones((1, tokens, shape[-1]), dtype)
        cotangent = mx.ones((1, tokens, shape[-2]), dtype)
        mx.eval(mx.vjp(lambda h: layer(h), [x], [cotangent]))

    return run


def _median(run: Callable[[int], None], tokens: int, end: float) -> float:
    """Return the median seconds of a few runs, fewer when time is up.

    The first run is not counted: it may compile for minutes.
    """
    run(tokens)
    taken: list[float] = []
    while not taken or len(taken) < _REPEATS and time.perf_counter() < end:
        start = time.perf_counter()
        run(tokens)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _bucket(tokens: int) -> int:
    """Return the power of two at or above a number of tokens."""
    return 1 << max(tokens - 1, 0).bit_length()


def _key(kind: _Kind, tokens: int, dtype: mx.Dtype | None) -> str:
    """Return what a race is remembered under: everything that may change its result."""
    info = mx.device_info() if backend() != "cpu" else {}
    parts = [
        f"{backend()} {info.get('device_name', os.uname().machine)} {os.cpu_count()}",
        f"blas {bool(blas.status().loaded)}",
        f"mlx {mx.__version__}",  # pyright: ignore[reportAttributeAccessIssue]: not in MLX's stub
        "×".join(map(str, kind.shape)),
        kind.storage.label,
        str(tokens),
        str(dtype),
    ]
    return " | ".join(parts)


def _is_race(entry: Any) -> bool:
    """Whether an entry of the file is a race: another program may have written anything."""
    return (
        isinstance(entry, list)
        and len(entry) == 3
        and all(isinstance(x, (int, float)) and x >= 0 for x in entry)
    )


def _read() -> dict[str, Any]:
    try:
        known = json.loads((cache_folder() / _FILE).read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write(known: dict[str, Any]) -> None:
    """Replace the file whole; a cache that cannot be written is no error."""
    try:
        text = json.dumps(known, indent=0)
        write_file(cache_folder() / _FILE, lambda new: new.write_text(text))
    except OSError:
        return
