"""What a step needs from its first moment to its last: weights, adapter and optimizer state.

Known to the byte from shapes alone; an estimate's other parts are read from the step.
"""

from __future__ import annotations

from math import prod

from qlab.core.config.lora import LoRAConfig
from qlab.core.config.quant import QuantConfig
from qlab.core.config.spec import ModelSpec
from qlab.core.memory.setup import Setup
from qlab.engine.quantize.quantize import chosen


def chosen_storage(spec: ModelSpec, setup: Setup) -> dict[str, QuantConfig]:
    """Return how the layers that a setup quantizes are stored, by path."""
    if setup.plan is None:
        return {}
    return chosen(spec, setup.plan)


def trained_shapes(lora: LoRAConfig, spec: ModelSpec) -> list[tuple[int, ...]]:
    """Return the shapes of all arrays that an adapter trains."""
    adapter_kind = lora.adapter_kind
    shapes: list[tuple[int, ...]] = []
    for layer in lora.targets(spec):
        arrays = adapter_kind.shapes(layer.shape, lora.rank, layer.kind)
        shapes.extend(arrays.values())
    return shapes


def input_nbytes(spec: ModelSpec, setup: Setup) -> dict[str, int]:
    """Return the bytes of the parts ``weights``, ``adapter`` and ``optimizer``."""
    storage = chosen_storage(spec, setup)
    weights = spec.other_nbytes
    for layer in spec.layers:
        config = storage.get(layer.path)
        weights += layer.nbytes_as(config)
    itemsize = setup.adapter.itemsize
    optimizer_kind = setup.train.optimizer_kind
    numbers = 0
    states = 0
    for shape in trained_shapes(setup.adapter, spec):
        numbers += prod(shape)
        states += optimizer_kind.state_nbytes(shape, itemsize)
    return {
        "weights": weights,
        "adapter": itemsize * numbers,
        "optimizer": states,
    }
