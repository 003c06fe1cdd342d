"""Which product of the frozen base is the fastest here.

Tried out on the model's own layers, and remembered on disk.

A quantized weight can be multiplied by MLX's quantized kernel, or written out and multiplied as a
dense one. Which is faster turns on shape, storage, number of tokens and device; the gradients are
the same. Knows no step and no data.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qlab.core.config.lora import LoRAConfig
from qlab.core.config.quant import QuantConfig
from qlab.core.config.spec import LayerSpec, ModelSpec
from qlab.engine.models.surgery import module_at
from qlab.errors import ConfigError
from qlab.nn.frozen import Compute, Frozen, usual_compute
from qlab.runtime import blas
from qlab.runtime.atomic import write_file
from qlab.runtime.device import backend
from qlab.runtime.paths import cache_folder

PRODUCTS = ("auto", "kernel", "dequantize")
_BUDGET_S = 2.0  # of all trials of a run together
_REPEATS = 3
_FEW = 32  # tokens of a first, short trial
_HOPELESS = 3.0  # times slower in the short trial: not tried at full length
# of the norm: a kernel whose numbers are further from those of the dequantized weights is not used
_FAR = 0.05
_NOISE = 1.05  # a kernel must be faster by this much: dequantizing once serves the way back, too
_FILE = "products.json"


def choose_compute(
    module: nn.Module, spec: ModelSpec, lora: LoRAConfig | None, tokens: int, product: str = "auto"
) -> tuple[Compute, tuple[str, ...]]:
    """Return how the frozen layers of a model are computed fastest, and a line on how that was
    found. Runs on the MLX thread.

    Takes about two seconds at most, and none if the same products were tried before on this device
    with this MLX.

    Args:
        module: the model, its arrays in memory; it is not changed.
        spec: its layers.
        lora: the adapters; only blocks that they reach pass twice.
        tokens: that pass the model at once.
        product: ``kernel`` or ``dequantize`` instead of a trial.

    Raises:
        ConfigError: no such product.
    """
    if product not in PRODUCTS:
        raise ConfigError(f"product={product!r} is not legal; choose one of {', '.join(PRODUCTS)}.")
    dtype = usual_compute().dtype
    looks = _looks(spec)
    kernels = {
        look: layers
        for look, layers in looks.items()
        if _has_kernel(module_at(module, layers[0].path))
    }
    if not kernels:
        return Compute(dtype, True), (
            "product of the base: dequantized, the storage has no kernel",
        ) if looks else ()
    if product != "auto":
        return Compute(dtype, product == "dequantize"), (
            f"product of the base: {product}, as asked",
        )
    times, tried = _times(module, kernels, tokens, dtype)
    costs = [sum(times[look][n] * len(layers) for look, layers in kernels.items()) for n in (0, 1)]
    if math.isinf(costs[0]):
        return Compute(dtype, True), (
            "product of the base: dequantized, for MLX's kernel gives other numbers here",
        )
    dequantize = not costs[0] * _NOISE < costs[1]
    first, other = ("dequantized", "by kernel") if dequantize else ("by kernel", "dequantized")
    ratio = max(costs) / max(min(costs), 1e-12)
    how = f"{tried} tried now" if tried else "remembered"
    more = "at least " if any(x[2] for x in times.values()) else ""
    width = f", in {str(dtype).removeprefix('mlx.core.')}" if dtype else ""
    note = f"product of the base: {first}{width}, {more}{ratio:.1f} times as fast as {other} at {_bucket(tokens)} tokens ({how})"
    return Compute(dtype, dequantize), (note,)


def _looks(spec: ModelSpec) -> dict[tuple[tuple[int, ...], QuantConfig], list[LayerSpec]]:
    """Quantized linear layers of the blocks by shape and storage."""
    found: dict[tuple[tuple[int, ...], QuantConfig], list[LayerSpec]] = {}
    for layer in spec.layers:
        if layer.kind == "linear" and layer.block is not None and layer.storage:
            found.setdefault((layer.shape, layer.storage), []).append(layer)
    return found


def _has_kernel(layer: nn.Module) -> bool:
    return isinstance(layer, nn.QuantizedLinear)


def _times(
    module: nn.Module, looks: dict, tokens: int, dtype: mx.Dtype | None
) -> tuple[dict[Any, list], int]:
    """Seconds of both products by look.

    Kernel, dequantized, and whether the slower was judged by a short trial only.
    """
    known = _read()
    found = {}
    tried = 0
    count = _bucket(tokens)
    for look, layers in looks.items():
        key = _key(look, count, dtype)
        if not _sound(known.get(key)):
            known[key] = _race(
                module_at(module, layers[0].path), look[0], count, dtype, _BUDGET_S / len(looks)
            )
            tried += 1
        found[look] = known[key]
    if tried:
        _write({key: known[key] for key in known if _sound(known[key])})
    return found, tried


def _race(
    layer: nn.Module, shape: tuple[int, ...], tokens: int, dtype: mx.Dtype | None, budget_s: float
) -> list:
    """Return the seconds of a product and its way back by kernel and dequantized.

    The hopeless one by extrapolation.

    A kernel that is wrong never ends.
    """
    wide = dtype or layer.scales.dtype
    wide = wide if mx.issubdtype(wide, mx.floating) else mx.bfloat16
    if not _agree(layer, shape, dtype, wide):
        return [math.inf, 0.0, False]
    runs = [_product(Frozen(layer, dtype, dequantize), shape, wide) for dequantize in (False, True)]
    few = min(_FEW, tokens)
    for run in runs:
        run(few)
    end = time.perf_counter() + budget_s
    short = [_median(run, few, end) for run in runs]
    slow = short.index(max(short))
    if tokens == few:
        return [*short, False]
    # a kernel's time grows with the tokens; writing a weight out does not, so only the kernel can
    # be hopeless
    if slow == 0 and short[0] > _HOPELESS * short[1]:
        return [short[0] * tokens / few, _median(runs[1], tokens, end), True]
    return [*(_median(run, tokens, end) for run in runs), False]


def _agree(
    layer: nn.Module, shape: tuple[int, ...], dtype: mx.Dtype | None, wide: mx.Dtype
) -> bool:
    """Whether the kernel multiplies by the weights that are stored.

    On CUDA MLX 0.32.4 was seen not to, in float32.
    """
    x = mx.random.normal((_FEW, shape[-1]), key=mx.random.key(0)).astype(wide)
    kernel, dense = (
        Frozen(layer, dtype, dequantize)(x).astype(mx.float32) for dequantize in (False, True)
    )
    return (mx.linalg.norm(kernel - dense) <= _FAR * mx.linalg.norm(dense)).item()


def _product(layer: Frozen, shape: tuple[int, ...], dtype: mx.Dtype) -> Callable[[int], None]:
    def run(tokens: int) -> None:
        x = mx.ones((1, tokens, shape[-1]), dtype)
        cotangent = mx.ones((1, tokens, shape[-2]), dtype)
        mx.eval(mx.vjp(lambda h: layer(h), [x], [cotangent]))

    return run


def _median(run: Callable[[int], None], tokens: int, end: float) -> float:
    """Median seconds of a few runs; fewer when time is up. The first run is not counted.

    It may compile for minutes.
    """
    run(tokens)
    taken: list[float] = []
    while not taken or len(taken) < _REPEATS and time.perf_counter() < end:
        start = time.perf_counter()
        run(tokens)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _bucket(tokens: int) -> int:
    """The power of two at or above."""
    return 1 << max(tokens - 1, 0).bit_length()


def _key(look: tuple[tuple[int, ...], QuantConfig], tokens: int, dtype: mx.Dtype | None) -> str:
    shape, storage = look
    info = mx.device_info() if backend() != "cpu" else {}
    device = f"{backend()} {info.get('device_name', os.uname().machine)} {os.cpu_count()}"
    library = bool(blas.status().loaded)
    return f"{device} | blas {library} | mlx {mx.__version__} | {'×'.join(map(str, shape))} | {storage.label} | {tokens} | {dtype}"


def _sound(entry: Any) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) == 3
        and all(isinstance(x, (int, float)) and x >= 0 for x in entry)
    )


def _read() -> dict[str, Any]:
    try:
        found = json.loads((cache_folder() / _FILE).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(known: dict[str, Any]) -> None:
    """Replace the file whole; a cache that cannot be written is no error."""
    try:
        text = json.dumps(known, indent=0)
        write_file(cache_folder() / _FILE, lambda new: new.write_text(text))
    except OSError:
        return


def forget(products: Iterable[str] = ()) -> None:
    """Forget all trials, or those whose key holds one of some words."""
    words = tuple(products)
    _write(
        {
            key: value
            for key, value in _read().items()
            if words and not any(word in key for word in words)
        }
    )
