"""What passes through the layers of a model on a text.

Collected block by block, so that few of them exist at once.

Knows no weight and no scheme.
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
        seen: float32 ``(tokens, in)``, from which a start is computed.
        heldout: float32 ``(tokens, in)``, on which it is judged.
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
        return max(_DAMPING * self.power.mean().item(), 1e-12)

    @cached_property
    def root(self) -> mx.array:
        """L with L·Lᵀ = E[x xᵀ] + damping, float32 ``(in, in)``."""
        moments = np.array(self.seen.T @ self.seen, np.float64) / len(self.seen)
        return mx.array(
            np.linalg.cholesky(moments + self.damping * np.eye(len(moments))), mx.float32
        )


Passed = (
    Inputs | dict[int, Inputs]
)  # of a layer; of a mixture's experts by number, those that the text reached
_Call = tuple[mx.array, ...]  # rows, and for experts the numbers of those that they went to


class _Tap(nn.Module):
    """A layer that keeps what passes through it."""

    def __init__(self, inner: nn.Module, seen: list[_Call]) -> None:
        super().__init__()
        self.inner = inner
        self._seen = seen

    def __call__(self, x: mx.array, *indices: mx.array, **options: Any) -> mx.array:
        if mx.issubdtype(x.dtype, mx.floating):  # an embedding is looked up with integers
            self._seen.append((x, *indices))
        return self.inner(x, *indices, **options)

    def as_linear(self, x: mx.array) -> mx.array:
        self._seen.append((x,))
        return self.inner.as_linear(x)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


def texts(tokenizer: Any, text: Any, vocabulary: int) -> tuple[list[mx.array], list[mx.array]]:
    """Return token rows to compute from, and others to judge on.

    Two embedded texts, or two parts of one that is given.

    Args:
        tokenizer: mlx-lm's wrapper.
        text: see ``engine.data.text.read_text``.
        vocabulary: ids that the model knows.

    Raises:
        ConfigError: the text is too short to be parted.
    """
    if text is None:
        seen, _ = batches(tokenizer, None, "calibration.txt", CALIBRATION_TOKENS, vocabulary)
        return seen, batches(tokenizer, None, "heldout.txt", HELDOUT_TOKENS, vocabulary)[0]
    rows, words = batches(tokenizer, text, "", CALIBRATION_TOKENS + HELDOUT_TOKENS, vocabulary)
    cut = max(1, round(len(rows) * CALIBRATION_TOKENS / (CALIBRATION_TOKENS + HELDOUT_TOKENS)))
    if cut == len(rows):
        raise ConfigError(
            f"The text ({words}) is too short: one part is computed from and another judged on."
        )
    return rows[:cut], rows[cut:]


def passing(
    model: nn.Module, paths: list[str], seen: list[mx.array], heldout: list[mx.array]
) -> Iterator[dict[str, Passed]]:
    """Run two texts through a model; yield the inputs of its layers, those of one block at a time.

    Args:
        model: a dense model; it is not changed.
        paths: of the layers to watch.
        seen: token ids ``(1, T)`` of the one text.
        heldout: of the other.
    """
    found: dict[str, list[_Call]] = {path: [] for path in paths}
    watched = map_layers(model, paths, lambda path, inner: _Tap(inner, found[path]))
    rows = seen + heldout
    try:
        stack = BlockStack(watched)
        states = [stack.before(row) for row in rows]
    except UnsupportedError:  # then all at once
        for row in rows:
            watched(row)
        yield _taken(found, len(seen))
        return
    hidden = [x for x, _ in states]
    for number, block in enumerate(stack.blocks):
        hidden = [
            block(x, *calls[number][0], **calls[number][1])
            for x, (_, calls) in zip(hidden, states, strict=True)
        ]
        mx.eval(hidden)
        yield _taken(found, len(seen))
    if any(not path.startswith(f"{stack.path}.") for path in paths):
        for x in hidden:
            stack.after(x)
        yield _taken(found, len(seen))


def _taken(found: dict[str, list[_Call]], count: int) -> dict[str, Passed]:
    """Put together what was seen and forget it.

    Layers that read the same arrays share one ``Inputs``.
    """
    made: dict[tuple[int, ...], Passed] = {}
    taken = {}
    for path, calls in found.items():
        if calls:
            key = tuple(id(array) for call in calls for array in call)
            if key not in made:
                made[key] = _inputs(calls[:count], calls[count:])
            taken[path] = made[key]
    for calls in found.values():
        calls.clear()
    return taken


def _inputs(seen: list[_Call], heldout: list[_Call]) -> Passed:
    (x, to) = _rows(seen)
    (y, to_y) = _rows(heldout)
    if to is None:
        mx.eval(x, y)
        return Inputs(x, y)
    made = {
        expert: Inputs(_of(x, to, expert), _of(y, to_y, expert))
        for expert in np.unique(to).tolist()
    }
    mx.eval([(own.seen, own.heldout) for own in made.values()])
    return made


def _rows(calls: list[_Call]) -> tuple[mx.array, np.ndarray | None]:
    """Return float32 rows ``(tokens, in)`` and the expert of each.

    A row that went to several stands there as often.
    """
    rows = []
    experts = []
    for x, *indices in calls:
        for to in indices:
            shape = np.broadcast_shapes(x.shape[:-2], to.shape)
            x = mx.broadcast_to(x, (*shape, *x.shape[-2:]))
            experts.append(
                np.array(mx.broadcast_to(to[..., None], (*shape, x.shape[-2]))).reshape(-1)
            )
        rows.append(x.reshape(-1, x.shape[-1]).astype(mx.float32))
    return mx.concatenate(rows), np.concatenate(experts) if experts else None


def _of(rows: mx.array, experts: np.ndarray, expert: int) -> mx.array:
    return rows[mx.array(np.flatnonzero(experts == expert).astype(np.int32))]
