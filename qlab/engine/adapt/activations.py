"""Collects the inputs of a model's layers on a text, block by block, so that few exist at once.

Error-compensating initializations are computed from them (``directions.py``), and what ranks
recover is measured on them (``recovery.py``). Knows no weight and no scheme.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from qlab.engine.data.text import batches
from qlab.engine.models.blocks import BlockStack
from qlab.engine.models.surgery import map_layers
from qlab.errors import ConfigError, UnsupportedError

# of the mean power, added to every direction (GPTQ, arXiv:2210.17323, section 3.3, step 3)
_DAMPING = 1e-2
CALIBRATION_TOKENS = 2048
HELDOUT_TOKENS = 1024


@dataclass(frozen=True, eq=False)
class Inputs:
    """Inputs of a layer.

    Attributes:
        seen: float32 ``(tokens, in)``, from which an initialization is computed.
        heldout: float32 ``(tokens, in)``, on which it is measured.
    """

    seen: mx.array
    heldout: mx.array

    @cached_property
    def power(self) -> mx.array:
        """Mean square of each input, float32 ``(in,)``."""
        return mx.square(self.seen).mean(0)

    @cached_property
    def damping(self) -> float:
        """What is added to the power of every direction."""
        mean: Any = self.power.mean().item()
        return max(_DAMPING * mean, 1e-12)

    @cached_property
    def root(self) -> mx.array:
        """L with L·Lᵀ = E[x xᵀ] + damping, float32 ``(in, in)``."""
        gram = self.seen.T @ self.seen
        moments = np.array(gram, np.float64) / len(self.seen)
        identity = np.eye(len(moments))
        damped = moments + self.damping * identity
        root = np.linalg.cholesky(damped)
        return mx.array(root, mx.float32)


# of a layer; of a mixture by the numbers of those experts that the text reached
LayerInputs = Inputs | dict[int, Inputs]
# what a layer was called with: rows, and for experts the numbers of those that they went to
_Call = tuple[mx.array, ...]


class _Tap(nn.Module):
    """A layer that records what it is called with."""

    def __init__(self, inner: nn.Module, calls: list[_Call]) -> None:
        super().__init__()
        self.inner: Any = inner
        self._calls = calls

    def __call__(self, x: mx.array, *indices: mx.array, **options: Any) -> mx.array:
        if mx.issubdtype(x.dtype, mx.floating):  # an embedding is looked up with integers
            self._calls.append((x, *indices))
        return self.inner(x, *indices, **options)

    def as_linear(self, x: mx.array) -> mx.array:
        self._calls.append((x,))
        return self.inner.as_linear(x)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            inner = super().__getattr__("inner")
            return getattr(inner, name)


def texts(
    tokenizer: Any, text: Any, vocabulary: int | None
) -> tuple[list[mx.array], list[mx.array]]:
    """Return token rows to compute from, and others to measure on.

    Two embedded texts, or two parts of one that is given.

    Args:
        tokenizer: mlx-lm's wrapper.
        text: see ``engine.data.text.read_text``.
        vocabulary: number of ids that the model knows; None is not checked.

    Raises:
        ConfigError: the text is too short to be parted.
    """
    if text is None:
        seen, _ = batches(tokenizer, None, "calibration.txt", CALIBRATION_TOKENS, vocabulary)
        heldout, _ = batches(tokenizer, None, "heldout.txt", HELDOUT_TOKENS, vocabulary)
        return seen, heldout
    total = CALIBRATION_TOKENS + HELDOUT_TOKENS
    rows, words = batches(tokenizer, text, "", total, vocabulary)
    share = len(rows) * CALIBRATION_TOKENS / total
    cut = max(1, round(share))
    if cut == len(rows):
        raise ConfigError(
            f"The text ({words}) is too short: one part is computed from and another measured on."
        )
    return rows[:cut], rows[cut:]


def passing(
    model: nn.Module, paths: list[str], seen: list[mx.array], heldout: list[mx.array]
) -> Iterator[dict[str, LayerInputs]]:
    """Run two texts through a model; yield the inputs of its layers, those of one block at a time.

    Args:
        model: a dense model; it is not changed.
        paths: of the layers to watch.
        seen: token ids ``(1, T)`` of the one text.
        heldout: of the other.
    """
    calls: dict[str, list[_Call]] = {path: [] for path in paths}

    def tapped(path: str, inner: nn.Module) -> nn.Module:
        return _Tap(inner, calls[path])

    watched = map_layers(model, paths, tapped)
    rows = seen + heldout
    try:
        stack = BlockStack(watched)
        states = [stack.before(row) for row in rows]
    except UnsupportedError:  # its blocks cannot be run one by one: then all at once
        for row in rows:
            watched(row)
        yield _collected(calls, len(seen))
        return
    hidden = [x for x, _ in states]
    for number, block in enumerate(stack.blocks):
        for row, (_, block_calls) in enumerate(states):
            arguments, options = block_calls[number]
            hidden[row] = block(hidden[row], *arguments, **options)
        mx.eval(hidden)
        yield _collected(calls, len(seen))
    if any(not path.startswith(f"{stack.path}.") for path in paths):
        for x in hidden:
            stack.after(x)
        yield _collected(calls, len(seen))


def _collected(calls: dict[str, list[_Call]], count: int) -> dict[str, LayerInputs]:
    """Return the inputs of the layers that were called, and forget the calls.

    Layers that read the same arrays share one ``Inputs``.

    Args:
        calls: of each layer, by path.
        count: rows of the first text; the calls after them are of the second.
    """
    by_arrays: dict[tuple[int, ...], LayerInputs] = {}
    by_path = {}
    for path, of_layer in calls.items():
        if not of_layer:
            continue
        key = tuple(id(array) for call in of_layer for array in call)
        if key not in by_arrays:
            seen = of_layer[:count]
            heldout = of_layer[count:]
            by_arrays[key] = _inputs(seen, heldout)
        by_path[path] = by_arrays[key]
    for of_layer in calls.values():
        of_layer.clear()
    return by_path


def _inputs(seen: list[_Call], heldout: list[_Call]) -> LayerInputs:
    rows, experts = _rows(seen)
    other_rows, other_experts = _rows(heldout)
    if experts is None or other_experts is None:
        mx.eval(rows, other_rows)
        return Inputs(rows, other_rows)
    by_expert = {}
    for expert in np.unique(experts).tolist():
        seen_by_expert = _rows_of(rows, experts, expert)
        others_of_expert = _rows_of(other_rows, other_experts, expert)
        by_expert[expert] = Inputs(seen_by_expert, others_of_expert)
    arrays = [(inputs.seen, inputs.heldout) for inputs in by_expert.values()]
    mx.eval(arrays)
    return by_expert


def _rows(calls: list[_Call]) -> tuple[mx.array, np.ndarray | None]:
    """Return float32 rows ``(tokens, in)`` and the expert of each; None if there are no experts.

    A row that went to several experts stands there as often.
    """
    rows = []
    experts = []
    for x, *indices in calls:
        for numbers in indices:
            # x (…, 1, in) or (…, k, in) and numbers (…): every row with the expert that it went to
            count, width = x.shape[-2:]
            shape = np.broadcast_shapes(x.shape[:-2], numbers.shape)
            x = mx.broadcast_to(x, (*shape, count, width))
            of_rows = mx.broadcast_to(numbers[..., None], (*shape, count))
            flat_numbers = np.array(of_rows).reshape(-1)
            experts.append(flat_numbers)
        flat = x.reshape(-1, x.shape[-1])
        rows.append(flat.astype(mx.float32))
    all_rows = mx.concatenate(rows)
    if not experts:
        return all_rows, None
    return all_rows, np.concatenate(experts)


def _rows_of(rows: mx.array, experts: np.ndarray, expert: int) -> mx.array:
    places = np.flatnonzero(experts == expert)
    indices = mx.array(places.astype(np.int32))
    return rows[indices]
