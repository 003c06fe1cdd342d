"""A model split into its blocks and the rest, with its arrays placed in a graph.

``BlockwiseGraph`` and ``LossGraph`` share one. Runs on the MLX thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from qlab.core.config.train import TrainConfig
from qlab.engine.memory.graph_pieces import PieceGraph, Placed
from qlab.engine.models.blocks import BlockStack
from qlab.engine.step.protocol import Arrays
from qlab.nn.frozen import Frozen


class SplitModel:
    """A model whose blocks are read apart from what comes before and after them.

    Args:
        module: what ``attach`` returned, its arrays lazy or not; must have no other user.
        train: the run's settings.
        pieces: the graph that the model's arrays become inputs of.

    Attributes:
        stack: the blocks.
        trained: trainable arrays by path, in the dtype in which they are trained.
        placed: every array by path, as products take it: a factor that was cast is the cast one.
        outside: paths of the arrays outside the blocks.
        trained_outside: paths of those among them that are trained.

    Raises:
        UnsupportedError: the model has no list of blocks.
    """

    def __init__(self, module: nn.Module, train: TrainConfig, pieces: PieceGraph) -> None:
        self.module = module
        self.train = train
        self.stack = BlockStack(module)
        for layer in module.modules():
            if isinstance(layer, Frozen):
                layer.keep_dense()
        self._original: Arrays = dict(tree_flatten(module.parameters()))
        self.trained: Arrays = dict(tree_flatten(module.trainable_parameters()))
        self.placed: dict[str, Placed] = {}
        for path, array in self._original.items():
            role = "adapter" if path in self.trained else "weights"
            self.placed[path] = pieces.add_input(array, role)
        self.outside = self._outside_blocks(self._original)
        self.trained_outside = self._outside_blocks(self.trained)

    @property
    def outside_arrays(self) -> list[Placed]:
        """The arrays outside the blocks, in the order of ``outside``."""
        return [self.placed[path] for path in self.outside]

    @property
    def trains_embedding(self) -> bool:
        """Whether a trained array is needed before the blocks, so that gradients go that far."""
        layers: dict[str, Any] = dict(self.module.named_modules())
        for array_path in self.trained_outside:
            layer_path, _, _ = array_path.rpartition(".")
            layer = layers[layer_path]
            if layer.base.embeds:
                return True
        return False

    @property
    def heads(self) -> list[Frozen]:
        """Frozen layers behind the blocks; the embedding where it serves as head (tied)."""
        layers = dict(self.module.named_modules())
        outside = []
        for path in self._outside_blocks(layers):
            layer = layers[path]
            if isinstance(layer, Frozen):
                outside.append(layer)
        heads = [layer for layer in outside if not layer.embeds]
        return heads or outside

    def segments(self, tokens: mx.array) -> mx.array | None:
        """What stands for the numbers of packed rows: integers like the inputs, or None."""
        if not self.train.pack:
            return None
        return tokens[:, 1:]

    def put(self, paths: Iterable[str], arrays: Sequence[mx.array]) -> None:
        """Let the model compute with other arrays from now on."""
        pairs = list(zip(paths, arrays, strict=True))
        self.module.update(tree_unflatten(pairs))

    def restore(self) -> None:
        """Put back the arrays that the model had at first."""
        arrays = list(self._original.values())
        self.put(self._original, arrays)

    def _outside_blocks(self, paths: Iterable[str]) -> list[str]:
        prefix = f"{self.stack.path}."
        return [path for path in paths if not path.startswith(prefix)]
