"""Formulas of one model's kinds of step, read when first asked for.

A formula is read from steps of a few blocks (``core/graph/formula.py``): one step at two reference
sizes tells how every array grows, and one step with a block less tells what each block adds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import replace
from typing import NamedTuple

from qlab.core.config.spec import ModelSpec
from qlab.core.graph.formula import Formula, Sample, formula
from qlab.core.graph.graph import Graph
from qlab.core.graph.sizes import chunks, references
from qlab.core.memory.setup import Setup
from qlab.engine.memory.inputs import trained_shapes
from qlab.engine.memory.step_graphs import StepGraphs
from qlab.engine.memory.step_kind import SAMPLE_BLOCKS, StepKind, step_kind
from qlab.engine.memory.trace import runahead
from qlab.errors import UnsupportedError
from qlab.runtime.device import backend

_MOST_FORMULAS = 48  # remembered


class _Key(NamedTuple):
    """All that decides which operations a step consists of; the rest are sizes."""

    kind: Hashable
    adapter: str
    dtype: str
    has_dropout: bool
    optimizer: str
    grad_checkpoint: bool
    window: int
    accumulates: bool
    packs: bool
    chunks: int


class Formulas:
    """Formulas by kind of step, the last used ones remembered.

    Args:
        graphs: of the model.
        spec: its layers.
        vocabulary: length of a row of logits.
    """

    def __init__(self, graphs: StepGraphs, spec: ModelSpec, vocabulary: int) -> None:
        self._graphs = graphs
        self._spec = spec
        self._vocabulary = vocabulary
        self._formulas: OrderedDict[_Key, Formula] = OrderedDict()

    def __len__(self) -> int:
        return len(self._formulas)

    def of(self, setup: Setup) -> Formula:
        """Return the formula of a setup's kind of step.

        Raises:
            ConfigError, LayerNotFoundError: the setup does not fit the model.
            UnsupportedError: the step cannot be built, or has no formula.
        """
        kind = step_kind(self._spec, setup)
        key = _key(kind, setup)
        if key not in self._formulas:
            self._formulas[key] = self._read(kind, setup)
            if len(self._formulas) > _MOST_FORMULAS:
                self._formulas.popitem(last=False)
        self._formulas.move_to_end(key)
        return self._formulas[key]

    def _read(self, kind: StepKind, setup: Setup) -> Formula:
        """Read a formula from steps of a few blocks."""
        groups = list(kind.groups.values())
        targets = setup.adapter.targets(self._spec)
        largest_rank = min(min(layer.shape[-2:]) for layer in targets)
        one, two = references(
            _loss_chunks(setup),
            largest_rank,
            tiles=backend() == "cuda",  # ops/attention_tiles.py
        )

        most = SAMPLE_BLOCKS[setup.train.grad_checkpoint]
        sample = [group[-most:] for group in groups]
        try:
            blocks = [number for group in sample for number in group]
            pair = (
                self._graphs.of_blocks(setup, blocks, one),
                self._graphs.of_blocks(setup, blocks, two),
            )
        except (IndexError, UnsupportedError):  # a model that counts on its blocks is read whole
            sample = groups
            pair = (
                self._graphs.of_blocks(setup, None, one),
                self._graphs.of_blocks(setup, None, two),
            )
        # what one block adds is asked only where a model may have more than the sample has
        fewer: list[Graph | None] = []
        for index, group in enumerate(groups):
            graph = None
            if len(group) > most:
                graph = self._graphs.of_blocks(setup, _without_one_block(sample, index), one)
            fewer.append(graph)
        lora = replace(setup.adapter, rank=one.rank)
        return formula(
            Sample(
                pair=pair,
                fewer=tuple(fewer),
                references=(one, two),
                blocks=tuple(len(group) for group in sample),
                vocabulary=self._vocabulary,
                trained=tuple(trained_shapes(lora, self._spec)),
            ),
            runahead(),
        )


def _key(kind: StepKind, setup: Setup) -> _Key:
    lora = setup.adapter
    train = setup.train
    return _Key(
        kind=kind.key(SAMPLE_BLOCKS[train.grad_checkpoint]),
        adapter=lora.kind,
        dtype=lora.dtype,
        has_dropout=lora.dropout > 0,
        optimizer=train.optimizer,
        grad_checkpoint=train.grad_checkpoint,
        window=train.window,
        accumulates=train.grad_accumulation_steps > 1,
        packs=train.pack,
        chunks=_loss_chunks(setup),
    )


def _loss_chunks(setup: Setup) -> int:
    """Return in how many chunks the loss is made; 0 is at once, without chunks."""
    train = setup.train
    if not train.loss_chunk:
        return 0
    return chunks(train.batch_size, train.max_seq_length, train.loss_chunk)


def _without_one_block(groups: list[list[int]], index: int) -> list[int]:
    """Return the blocks of all groups but the first block of one.

    Example:
        >>> _without_one_block([[0, 1, 2], [3, 4]], 1)
        [0, 1, 2, 4]
    """
    blocks = []
    for number, group in enumerate(groups):
        blocks.extend(group[1:] if number == index else group)
    return blocks
