"""What a blockwise step must know of a block: where its arrays are, and which of them are trained.

Nothing is computed here. Also used by what reads the graph of that step (``engine/memory``).
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from qlab.engine.models.functional import ArrayPlace, Functional
from qlab.engine.step.protocol import Arrays
from qlab.nn.linear import Packed


class Block:
    """One block as a function of its arrays, and which of these are trained.

    Args:
        module: the block.
        path: of the block, such as ``model.layers.0``.
        parameters: all trained arrays of the model, by path.

    Attributes:
        functional: the block as a function of its arrays.
        trained: paths of its trained arrays, from the model's root.
        trained_numbers: their numbers among ``functional.arrays``.
        half_step: see ``half_step_parameters``.
    """

    def __init__(self, module: nn.Module, path: str, parameters: Arrays) -> None:
        self.functional = Functional(module)
        paths = [f"{path}.{place.path}" for place in self.functional.places]
        self.trained_numbers = [n for n, name in enumerate(paths) if name in parameters]
        self.trained = [paths[n] for n in self.trained_numbers]
        self.half_step = half_step_parameters(module, path, self.trained)


def array_places(module: nn.Module) -> list[ArrayPlace]:
    """Return where every array of a module stands.

    In the order in which a block's arrays are handed over and its gradients come.
    """
    return Functional(module).places


def castable_parameters(
    places: list[ArrayPlace], prefix: str, trained: Arrays
) -> dict[mx.Dtype, list[str]]:
    """Return which trained arrays may be cast to the dtype of the activations before they are used.

    None may where something else in the blocks would make activations wider on their way: then the
    dtype that enters a block is not the one that reaches its products.

    Args:
        places: of all arrays of what ``attach`` returned; see ``array_places``.
        prefix: of paths within the blocks, such as ``model.layers.``.
        trained: arrays by path.

    Returns:
        Paths by the one dtype of activations for which they may be cast; else nothing.
    """
    inside = [place for place in places if place.path.startswith(prefix)]
    dtypes = set()
    for place in inside:
        if place.path in trained or isinstance(place.holder, Packed):
            continue
        dtype = place.holder[place.key].dtype
        if mx.issubdtype(dtype, mx.floating):
            dtypes.add(dtype)
    if len(dtypes) != 1:
        return {}
    castable = [
        place.path
        for place in inside
        if place.path in trained and getattr(place.holder, "castable", False)
    ]
    return {dtypes.pop(): castable}


def half_step_parameters(block: nn.Module, path: str, trained: list[str]) -> list[str]:
    """Return those trained arrays whose gradients are there halfway through a backward pass.

    They are those of the part that was put into the block last, which as a rule comes last in the
    forward pass (the feed-forward part), so first in the backward pass. None if only one part of
    the block is trained.

    Args:
        block: a block, its parts in the order of its constructor.
        path: of the block.
        trained: paths of its trained arrays, from the model's root.
    """
    parts = []
    for key in block:
        of_part = [name for name in trained if name.startswith(f"{path}.{key}.")]
        if of_part:
            parts.append(of_part)
    return parts[-1] if len(parts) > 1 else []
