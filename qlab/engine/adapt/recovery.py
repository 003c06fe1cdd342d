"""Measures how much of a layer's quantization error each rank of an adapter recovers.

``recovery_cache.py`` asks for it, layer by layer. Runs on the MLX thread.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable

import mlx.core as mx
import numpy as np

from qlab.core.adapt.recovery import Recovery, noise_squares, on_grid
from qlab.core.config.spec import LayerSpec
from qlab.core.progress import Progress
from qlab.engine.adapt.activations import Inputs, LayerInputs
from qlab.engine.adapt.directions import (
    ALL_UP_TO,
    STARTS,
    WeightOf,
    directions,
    error_of,
    leading,
)
from qlab.ops.sums import stable_sum

_LEADING = 256  # singular values computed of a wide layer, for a spectrum
_EXPERTS = 8  # of a mixture, which speak for all of a layer's


def recovery(
    path: str, original: WeightOf, stored: WeightOf, inputs: LayerInputs | None
) -> Recovery | None:
    """Return what each rank recovers of a layer's error, or None if it has none.

    Every expert of a mixture has two factors, so the squares of some experts, evenly chosen, are
    added up by rank: the share is that of their common error, and a singular value that of a
    typical expert.

    Args:
        path: of the layer.
        original: returns W by path.
        stored: returns Ŵ by path.
        inputs: of the layer, on which outputs are compared; None measures weights alone.
    """
    error, weight = error_of(path, original, stored)
    stack = error.reshape(-1, *error.shape[-2:])  # (1, out, in), or one of each expert
    energies_of_each = mx.stack([stable_sum(matrix, mx.square) for matrix in stack])
    energies = np.array(energies_of_each, np.float64)
    if not energies.any():
        return None
    chosen = _evenly(np.flatnonzero(energies))
    squares = np.zeros(1)
    outputs = _OutputShares()
    for number in chosen:
        rank = _computed(stack[number])
        vectors, of_expert = leading(stack[number], rank)
        squares = squares + of_expert
        of_layer = inputs.get(number) if isinstance(inputs, dict) else inputs
        if of_layer is not None and len(of_layer.heldout):
            outputs.add(stack[number], of_layer, vectors, rank)
    energy = energies[chosen].sum()
    noise = noise_squares(*error.shape[-2:])
    return Recovery(
        path=path,
        relative_error=(energies.sum() / stable_sum(weight, mx.square).item()) ** 0.5,
        singular=on_grid(np.sqrt(squares / energy)),
        noise=on_grid(np.sqrt(noise)),
        weight=on_grid(np.minimum(np.cumsum(squares) / energy, 1)),
        noise_weight=on_grid(np.cumsum(noise)),
        output=outputs.by_start(),
    )


class _OutputShares:
    """Shares of the squared error of outputs on held-out text that each rank takes away."""

    def __init__(self) -> None:
        self._gains = dict.fromkeys(STARTS, np.zeros(1))  # squares by rank
        self._total = 0.0

    def add(self, error: mx.array, inputs: Inputs, vectors: mx.array, rank: int) -> None:
        """Add one layer, or one expert.

        Args:
            error: E, float32 ``(out, in)``.
            inputs: of the layer.
            vectors: left singular vectors of E, which are the directions of ``residual``.
            rank: how many directions to look at.
        """
        wrong = error @ inputs.heldout.T  # error of the outputs, (out, tokens)
        self._total += stable_sum(wrong, mx.square).item()
        for init in STARTS:
            left = vectors
            if init != "residual":
                left, _ = directions(init, error, inputs, rank)
            along = left[:, : min(error.shape)].T @ wrong  # (rank, tokens)
            gain = np.array(mx.square(along).sum(-1), np.float64)
            self._gains[init] = self._gains[init] + gain

    def by_start(self) -> dict[str, np.ndarray]:
        """Return the shares at the ranks of the grid, by initialization; empty without text."""
        if not self._total:
            return {}
        shares = {init: np.cumsum(gain) / self._total for init, gain in self._gains.items()}
        return {init: on_grid(np.minimum(share, 1)) for init, share in shares.items()}


def _evenly(experts: np.ndarray) -> list[int]:
    """Return some of the experts, evenly chosen."""
    count = min(len(experts), _EXPERTS)
    places = np.linspace(0, len(experts) - 1, count).round().astype(int)
    return experts[places].tolist()


def _computed(error: mx.array) -> int:
    """Return how many singular values of an error are computed."""
    narrow = min(error.shape)
    return narrow if narrow <= ALL_UP_TO else min(_LEADING, narrow)


def recoveries(
    layers: Iterable[LayerSpec],
    original: WeightOf,
    stored: WeightOf,
    groups: Iterable[dict[str, LayerInputs]],
    into: dict[str, Recovery | None],
) -> Generator[Progress, None, None]:
    """Measure what each rank recovers, layer by layer: first without data, then on a text.

    Args:
        layers: to look at.
        original: returns W by path.
        stored: returns Ŵ by path.
        groups: inputs by path, a block at a time; empty for none.
        into: filled with a ``Recovery`` by path, or None where there is no error.

    Yields:
        Progress after each layer.
    """
    paths = [layer.path for layer in layers]
    for number, path in enumerate(paths, 1):
        if path not in into:
            into[path] = recovery(path, original, stored, None)
            yield Progress("spectra of the quantization error", number, len(paths))
    text = "what initializations recover on held-out text"
    count = 0
    for group in groups:
        for path in paths:
            known = into[path]
            if path not in group or known is None:
                continue
            count += 1
            if not known.output:
                into[path] = recovery(path, original, stored, group[path])
                yield Progress(text, count, len(paths))
        yield Progress(text, count, len(paths))
