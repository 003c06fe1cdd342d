"""Steps of one model as graphs: of the whole model, or of a few of its blocks at reference sizes.

Nothing is computed, and no weights are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import mlx.core as mx
import mlx.nn as nn

from qlab.core.config.quant import QuantConfig
from qlab.core.config.spec import ModelSpec
from qlab.core.graph.graph import Graph
from qlab.core.graph.sizes import Reference
from qlab.core.memory.setup import Setup
from qlab.engine.adapt.attach import attach
from qlab.engine.memory.blockwise_step import BlockwiseGraph
from qlab.engine.memory.inputs import chosen_storage
from qlab.engine.memory.whole_step import whole
from qlab.engine.models.blocks import BlockStack
from qlab.engine.models.lazy_storage import readable, stored
from qlab.engine.models.skeleton import describe
from qlab.engine.models.surgery import put_module, twin
from qlab.engine.step.blockwise import WINDOWS
from qlab.errors import ConfigError, UnsupportedError
from qlab.nn.frozen import usual_compute
from qlab.runtime.device import backend


class StepGraphs:
    """Reads steps of a model as graphs, for ``Forecast``; on the MLX thread.

    Args:
        module: an mlx-lm model, lazy or loaded. It is not changed.
        spec: its layers.
    """

    def __init__(self, module: nn.Module, spec: ModelSpec) -> None:
        self._module = readable(module, spec)
        self._spec = spec

    @cached_property
    def why_whole(self) -> str:
        """Why the model can only be computed as one graph; empty if it can be taken apart."""
        try:
            BlockStack(twin(self._module)).before(mx.zeros((1, 2), mx.int32))
        except UnsupportedError as error:
            return str(error)
        return ""

    def must_be_whole(self, setup: Setup) -> bool:
        """Return whether a setup asks for checkpoints or chunks that this model cannot have."""
        wants_blocks = setup.train.grad_checkpoint or setup.train.loss_chunk > 0
        return bool(wants_blocks and self.why_whole)

    def of_setup(self, setup: Setup) -> Graph:
        """Return the whole step of a setup.

        Raises:
            UnsupportedError: the step cannot be built, or cannot be read.
        """
        return self._read(self._module, chosen_storage(self._spec, setup), setup)

    def of_blocks(self, setup: Setup, blocks: Sequence[int] | None, sizes: Reference) -> Graph:
        """Return the step of a model that has only some of the blocks, at reference sizes.

        Args:
            setup: its batch, length, rank and chunk are replaced by those of ``sizes``.
            blocks: numbers of the blocks to keep; None keeps all.
            sizes: of the step.

        Raises:
            IndexError: the model counts on a block that is gone.
            UnsupportedError: the step cannot be built, or cannot be read.
        """
        module = self._module
        storage = chosen_storage(self._spec, setup)
        targets = [layer.path for layer in setup.adapter.targets(self._spec)]
        if blocks is not None:
            module = twin(module)
            stack = BlockStack(module)
            numbers = sorted(blocks)
            put_module(module, stack.path, [stack.blocks[number] for number in numbers])
            moved = _moved_paths([layer.path for layer in self._spec.layers], stack.path, numbers)
            storage = {moved[path]: config for path, config in storage.items() if path in moved}
            targets = [moved[path] for path in targets if path in moved]
        lora = replace(setup.adapter, rank=sizes.rank, num_layers=-1, keys=tuple(targets))
        train = replace(
            setup.train,
            batch_size=sizes.batch,
            max_seq_length=sizes.tokens + 1,  # the last position of a row has no target
            loss_chunk=sizes.chunk,
        )
        return self._read(module, storage, replace(setup, adapter=lora, train=train))

    def _read(self, module: nn.Module, storage: dict[str, QuantConfig], setup: Setup) -> Graph:
        """Return the step of a module whose layers are stored as chosen."""
        quantized = stored(module, storage)
        train = setup.train
        if self.must_be_whole(setup):  # engine/step/choose.py makes the same step then
            train = replace(train, grad_checkpoint=False, loss_chunk=0)
        spec = describe(quantized, self._spec.name)
        adapted = attach(quantized, spec, setup.adapter, usual_compute(), train.grad_checkpoint)
        try:
            if not train.grad_checkpoint:
                return whole(adapted, train)
            window = train.window or WINDOWS[backend()][0]
            return BlockwiseGraph(adapted, train, window).read()
        except ConfigError:
            raise
        except ValueError as error:  # MLX's own refusal of a shape
            name = self._spec.name
            raise UnsupportedError(f"A step of {name!r} cannot be built: {error}") from error


def _moved_paths(paths: Sequence[str], stack: str, blocks: Sequence[int]) -> dict[str, str]:
    """Return where layers are once only some blocks are left; layers of other blocks are missing.

    Args:
        paths: of all layers.
        stack: path of the list of blocks, such as ``model.layers``.
        blocks: numbers of the blocks that are left, ascending.

    Example:
        >>> _moved_paths(["model.layers.4.mlp.up_proj", "lm_head"], "model.layers", [2, 4])
        {'model.layers.4.mlp.up_proj': 'model.layers.1.mlp.up_proj', 'lm_head': 'lm_head'}
    """
    place = {number: index for index, number in enumerate(blocks)}
    moved = {}
    for path in paths:
        if not path.startswith(f"{stack}."):
            moved[path] = path
            continue
        number, _, rest = path[len(stack) + 1 :].partition(".")
        if int(number) in place:
            moved[path] = f"{stack}.{place[int(number)]}.{rest}"
    return moved
