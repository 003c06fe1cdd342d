"""A part of a model as a function of its arrays, and what a step must know of a block.

Computes nothing.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qlab.engine.models.functional import Functional
from qlab.engine.step.protocol import Arrays
from qlab.nn.linear import Packed


class Block:
    """One block: where its arrays are, and which of them are trained."""

    def __init__(self, module: nn.Module, path: str, parameters: Arrays) -> None:
        self.piece = Functional(module)
        places = [f"{path}.{name}" for name, *_ in self.piece.places]
        self.chosen = [n for n, name in enumerate(places) if name in parameters]
        self.trained = [places[n] for n in self.chosen]
        self.first = half_step_parameters(module, path, self.trained)


def array_places(module: nn.Module) -> list[tuple[str, Any, Any]]:
    """Return path, holder and key of every array, in the order in which a block's are handed over
    and its gradients come.
    """
    return Functional(module).places


def castable_parameters(
    places: list[tuple[str, Any, Any]], prefix: str, trained: Arrays
) -> dict[mx.Dtype, list[str]]:
    """Return which trained arrays of the blocks serve as cast to the dtype of what enters them, by
    that dtype.

    None do where something else in the blocks would make activations wider on their way.

    Args:
        places: of the arrays of what ``attach`` returned; see ``array_places``.
        prefix: of paths within the blocks.
        trained: arrays by path.
    """
    inside = [
        (path, holder, holder[key]) for path, holder, key in places if path.startswith(prefix)
    ]
    others = (
        a for path, holder, a in inside if path not in trained and not isinstance(holder, Packed)
    )
    dtypes = {array.dtype for array in others if mx.issubdtype(array.dtype, mx.floating)}
    own = [
        path for path, holder, _ in inside if path in trained and getattr(holder, "castable", False)
    ]
    return {dtypes.pop(): own} if len(dtypes) == 1 else {}


def half_step_parameters(block: nn.Module, path: str, trained: list[str]) -> list[str]:
    """Return those of a block's trained arrays whose gradients are there when half of the way back
    is done.

    They are those of the part that was put into the block last, and so, as a rule, is the last on
    the way forward.

    Args:
        block: its parts in order.
        path: of the block.
        trained: paths.
    """
    parts = [
        own
        for key in block
        if (own := [name for name in trained if name.startswith(f"{path}.{key}.")])
    ]
    return parts[-1] if len(parts) > 1 else []
