"""Adapters that start as the best low-rank stand-in for the quantization error, and how much of it
each rank recovers.

With E = W − Ŵ and U the leading left singular vectors of E·S, the best correction of rank r in the
norm ‖(E − C)·S‖ is C = U·Uᵀ·E, so neither S nor its inverse is needed beyond the product E·S:

- ``residual``: S = 1, no data (ZeroQuant-V2's LoRC, arXiv:2303.08302).
- ``diagonal``: S² = diag E[x²] (LQER, arXiv:2402.02446; QERA, arXiv:2410.06040, theorem 2).
- ``qera``: S·Sᵀ = E[x xᵀ], damped (QERA, theorem 1): the least squared error of the output that the
  rank allows.

Knows no panel. Runs on the MLX thread.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Any

import mlx.core as mx
import numpy as np

from qlab.core.adapt.recovery import Recovery, noise_squares, on_grid
from qlab.core.config.lora import LoRAConfig
from qlab.core.config.spec import LayerSpec
from qlab.core.progress import Progress
from qlab.engine.adapt.activations import Inputs, Passed
from qlab.errors import WeightsError

Weight = Callable[[str], mx.array]
STARTS = ("residual", "diagonal", "qera")
_WHOLE = 1024  # width up to which all singular values are computed; above, the leading ones
_LEADING = 256  # how many, for a spectrum
_ROUNDS = 4
_EXPERTS = 8  # of a mixture that speak for all of a layer's


def leading(product: mx.array, rank: int) -> tuple[mx.array, np.ndarray]:
    """Return the leading left singular vectors and squared singular values of a matrix.

    Up to a width of 1024 all of them, from the eigenvectors of the smaller Gram matrix; above by
    subspace iteration (Halko, Martinsson & Tropp, arXiv:0909.4061, algorithm 4.4), which for a flat
    spectrum finds the directions roughly but their energy well.

    Args:
        product: float32 ``(out, n)``.
        rank: how many are needed at least.

    Returns:
        float32 ``(out, k)`` and float64 ``(k,)``, descending.
    """
    out, width = product.shape
    if min(out, width) > _WHOLE and 4 * rank < min(out, width):
        basis = mx.random.normal((out, rank + max(16, rank // 4)), key=mx.random.key(0))
        for _ in range(_ROUNDS):
            basis = mx.linalg.qr(product @ (product.T @ basis), stream=mx.cpu)[0]  # type: ignore
            mx.eval(basis)
        inner = basis.T @ product
        squares, turn = _descending(inner @ inner.T)
        return (basis @ turn)[:, :rank], squares[:rank]
    if out <= width:
        squares, vectors = _descending(product @ product.T)
        return vectors, squares
    squares, vectors = _descending(product.T @ product)
    return (product @ vectors) / mx.array(
        np.sqrt(np.maximum(squares, max(squares[0] * 1e-10, 1e-30))), mx.float32
    ), squares


def _descending(gram: mx.array) -> tuple[np.ndarray, mx.array]:
    values, vectors = mx.linalg.eigh(gram, stream=mx.cpu)  # type: ignore
    return np.maximum(np.array(values, np.float64)[::-1], 1e-300), vectors[:, ::-1]


def directions(
    init: str, error: mx.array, inputs: Inputs | None, rank: int
) -> tuple[mx.array, np.ndarray]:
    """Return the left singular vectors and squared singular values of E·S.

    A layer that saw no text counts all inputs alike.

    Args:
        init: which S.
        error: E, float32 ``(out, in)``.
        inputs: of the layer, or None.
        rank: how many are needed at least.
    """
    if init == "residual" or inputs is None:
        return leading(error, rank)
    if init == "diagonal":
        return leading(error * mx.sqrt(inputs.power), rank)
    if error.shape[1] <= error.shape[0]:
        return leading(error @ inputs.root, rank)
    # E·E[x xᵀ]·Eᵀ without a matrix of the input's width squared
    seen = (error @ inputs.seen.T) * len(inputs.seen) ** -0.5
    return leading(mx.concatenate([seen, error * inputs.damping**0.5], axis=1), rank)


def error_of(path: str, original: Weight, stored: Weight) -> tuple[mx.array, mx.array]:
    """Return E and W of a layer, float32.

    Raises:
        WeightsError: one of them is no number.
    """
    weight = original(path).astype(mx.float32)
    error = weight - stored(path).astype(mx.float32)
    if not mx.isfinite(error).all().item():
        raise WeightsError(
            f"Layer {path!r} holds NaN or infinite weights; its quantization error is no number."
        )
    return error, weight


def recovery(path: str, original: Weight, stored: Weight, inputs: Passed | None) -> Recovery | None:
    """Return what each rank recovers of a layer's error, or None if it has none.

    Every expert of a mixture has factors of its own, so the squares of some experts, evenly chosen,
    are added up by rank: the share is that of their common error, and a singular value that of a
    typical expert.
    """
    error, weight = error_of(path, original, stored)
    stack = error.reshape(-1, *error.shape[-2:])  # the layer's own, or one of each expert
    energies = np.array(mx.square(stack).sum((1, 2)), np.float64)
    if not energies.any():
        return None
    relative = (energies.sum() / mx.square(weight).sum().item()) ** 0.5
    some = _some(np.flatnonzero(energies))
    squares = np.zeros(1)
    gains = dict.fromkeys(STARTS, np.zeros(1))
    totals = 0.0
    for number in some:
        own = stack[number]
        left, found = leading(own, rank := _kept(own))
        squares = squares + found
        given = inputs.get(number) if isinstance(inputs, dict) else inputs
        if given is not None and len(given.heldout):
            wrong = own @ given.heldout.T
            totals += mx.square(wrong).sum().item()
            for init in STARTS:
                vectors = left if init == "residual" else directions(init, own, given, rank)[0]
                gains[init] = gains[init] + np.array(
                    mx.square(vectors[:, : min(own.shape)].T @ wrong).sum(-1), np.float64
                )
    energy = energies[some].sum()
    noise = noise_squares(*error.shape[-2:])
    return Recovery(
        path,
        relative,
        on_grid(np.sqrt(squares / energy)),
        on_grid(np.sqrt(noise)),
        on_grid(np.minimum(np.cumsum(squares) / energy, 1)),
        on_grid(np.cumsum(noise)),
        {
            init: on_grid(np.minimum(np.cumsum(own) / totals, 1))
            for init, own in gains.items()
            if totals
        },
    )


def _some(experts: np.ndarray) -> list[int]:
    return experts[
        np.linspace(0, len(experts) - 1, min(len(experts), _EXPERTS)).round().astype(int)
    ].tolist()


def _kept(error: mx.array) -> int:
    """How many singular values of an error are computed."""
    few = min(error.shape)
    return few if few <= _WHOLE else min(_LEADING, few)


def recoveries(
    layers: Iterable[LayerSpec],
    original: Weight,
    stored: Weight,
    groups: Iterable[dict[str, Passed]],
    into: dict[str, Any],
) -> Generator[Progress, None, None]:
    """Compute what each rank recovers, layer by layer.

    First without data, then with the inputs of a text.

    Args:
        layers: to look at.
        original: returns W by path.
        stored: returns Ŵ by path.
        groups: inputs by path, a block at a time; empty for none.
        into: filled with a ``Recovery`` by path, or None where there is no error.

    Yields:
        Progress after each layer.
    """
    todo = [layer.path for layer in layers]
    for number, path in enumerate(todo):
        if path not in into:
            into[path] = recovery(path, original, stored, None)
            yield Progress("spectra of the quantization error", number + 1, len(todo))
    count = 0
    for group in groups:
        for path in [path for path in todo if path in group and into[path] is not None]:
            count += 1
            if not into[path].output:
                into[path] = recovery(path, original, stored, group[path])
                yield Progress("what starts recover on held-out text", count, len(todo))
        yield Progress("what starts recover on held-out text", count, len(todo))


def start(
    lora: LoRAConfig,
    layers: Iterable[LayerSpec],
    original: Weight,
    stored: Weight,
    groups: Iterable[dict[str, Passed]],
) -> Generator[Progress, None, dict[str, mx.array]]:
    """Compute the trainable arrays of adapters that make up for the quantization error.

    Args:
        lora: kind, rank, scale, dtype, and the start.
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
    found: dict[str, mx.array] = {}
    count = len(todo)

    def one(path: str, inputs: Passed | None) -> Progress:
        layer = todo.pop(path)
        for name, array in _arrays(lora, layer, *error_of(path, original, stored), inputs).items():
            found[f"{path}.{name}"] = array
        return Progress("making up for the quantization error", count - len(todo), count)

    if lora.init != "residual":
        for group in groups:
            for path in [path for path in todo if path in group]:
                yield one(path, group[path])
    for path in list(todo):
        yield one(path, None)
    return found


def _arrays(
    lora: LoRAConfig, layer: LayerSpec, error: mx.array, weight: mx.array, inputs: Passed | None
) -> dict[str, mx.array]:
    if layer.kind == "switch":
        given = inputs if isinstance(inputs, dict) else {}
        b, a = map(
            mx.stack,
            zip(*(_pair(lora, own, given.get(e)) for e, own in enumerate(error)), strict=True),
        )
    else:
        b, a = _pair(lora, error, inputs)  # type: ignore
        a, b = (b, a) if layer.kind == "embedding" else (a.T, b.T)
    made = lora.adapter_kind.compensated(a, b, mx.linalg.norm(weight, axis=-1))
    made = {name: array.astype(getattr(mx, lora.dtype)) for name, array in made.items()}
    mx.eval(made)
    return made


def _pair(lora: LoRAConfig, error: mx.array, inputs: Inputs | None) -> tuple[mx.array, mx.array]:
    """Return ``(out, rank)`` and ``(rank, in)`` whose product, times the scale, is the best
    stand-in for an error.
    """
    out, width = error.shape
    if not mx.any(
        error
    ).item():  # nothing to make up for: no effect at first, and a slope to learn along
        drawn = mx.random.uniform(-1, 1, (lora.rank, width), key=mx.random.key(0))
        return mx.zeros((out, lora.rank)), drawn * width**-0.5
    left = directions(lora.init, error, inputs, lora.rank)[0][:, : lora.rank]
    right = left.T @ error
    # both factors get rows of equal length, and the scale is divided out of them
    length = mx.sqrt(mx.maximum(mx.linalg.norm(right, axis=1), 1e-20))
    part = abs(lora.scale) ** -0.5
    return left * length * part, right / length[:, None] * (part if lora.scale > 0 else -part)
