"""Which steps need memory by the same formula: those whose blocks look alike.

Two setups are of one kind if the same layers, stored alike, are adapted in blocks of the same
looks; then only sizes and the number of blocks differ, which a formula leaves open.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from qlab.core.config.quant import QuantConfig
from qlab.core.config.spec import LayerSpec, ModelSpec
from qlab.core.memory.setup import Setup
from qlab.engine.memory.inputs import chosen_storage

# Blocks of each look in the step that a formula is read from, by whether blocks are checkpointed.
# A checkpointed block leaves nothing but its input behind, so fewer show what one more adds.
SAMPLE_BLOCKS = {True: 3, False: 4}


class LayerLook(NamedTuple):
    """What one layer is to a step.

    Attributes:
        role: within its block, such as ``mlp.down_proj``.
        shape: ``(…, out, in)`` of the dequantized weight.
        present: how the model stores it now; None is not quantized.
        chosen: how the setup stores it; None leaves it as it is.
        adapted: whether it gets an adapter.
    """

    role: str
    shape: tuple[int, ...]
    present: QuantConfig | None
    chosen: QuantConfig | None
    adapted: bool


BlockLook: TypeAlias = tuple[LayerLook, ...]


@dataclass(frozen=True)
class StepKind:
    """What makes the kind of a step.

    Attributes:
        groups: numbers of the blocks that a gradient reaches, by the look of their layers; in the
            order in which the looks first occur.
        outside: the layers outside the blocks, such as the embedding.
    """

    groups: dict[BlockLook, list[int]]
    outside: BlockLook

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of blocks of each look."""
        return tuple(len(group) for group in self.groups.values())

    def key(self, most: int) -> Hashable:
        """Return what two kinds share whose steps need memory by one formula.

        Args:
            most: blocks of a look from which on a formula holds for any number of them.
        """
        looks = tuple(self.groups)
        counts = tuple(min(count, most + 1) for count in self.counts)
        return looks, counts, self.outside


def step_kind(spec: ModelSpec, setup: Setup) -> StepKind:
    """Return the kind of a setup's step.

    Raises:
        ConfigError, LayerNotFoundError: the setup does not fit the model.
    """
    targets = {layer.path for layer in setup.adapter.targets(spec)}
    storage = chosen_storage(spec, setup)

    def look(layers: list[LayerSpec]) -> BlockLook:
        return tuple(
            LayerLook(
                role=layer.role,
                shape=layer.shape,
                present=layer.storage,
                chosen=storage.get(layer.path),
                adapted=layer.path in targets,
            )
            for layer in layers
        )

    outside: list[LayerSpec] = []
    blocks: dict[int, list[LayerSpec]] = {}
    for layer in spec.layers:
        if layer.block is None:
            outside.append(layer)
        else:
            blocks.setdefault(layer.block, []).append(layer)
    looks = {number: look(layers) for number, layers in blocks.items()}
    groups: dict[BlockLook, list[int]] = {}
    first = _first_reached(spec, looks, targets)
    for number, block_look in looks.items():
        if number >= first:
            groups.setdefault(block_look, []).append(number)
    return StepKind(groups, look(outside))


def _first_reached(spec: ModelSpec, looks: dict[int, BlockLook], targets: set[str]) -> int:
    """Return the first block that a gradient must reach.

    The backward pass ends at the lowest adapted block, or at an adapted embedding, which lies below
    all blocks. If only layers above the blocks are adapted, all blocks count.
    """
    adapted = [number for number, look in looks.items() if any(layer.adapted for layer in look)]
    trains_embedding = any(
        layer.path in targets for layer in spec.layers if layer.kind == "embedding"
    )
    if adapted and not trains_embedding:
        return min(adapted)
    return min(looks, default=0)
