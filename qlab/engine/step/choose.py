"""Picks the way in which a training step is computed; called once, when a run is set up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn

from qlab.core.config.legal import check_choice
from qlab.core.config.train import TrainConfig
from qlab.engine.models.blocks import BlockStack, run
from qlab.engine.models.packed_rows import takes_batches
from qlab.engine.step.blockwise import BlockwiseStep
from qlab.engine.step.protocol import Arrays, LossAndGradients, StepBatch, TrainStep
from qlab.engine.step.whole import WholeGraphStep
from qlab.errors import UnsupportedError

CHOICES = ("auto", "whole", "stepped")


def make_step(module: nn.Module, config: TrainConfig, *, how: str = "auto") -> TrainStep:
    """Return the function that computes loss and gradients of a run's batches.

    Runs the model on a few tokens, to see whether it can be taken apart into its blocks.

    Example:
        >>> step = make_step(attach(module, spec, lora, usual_compute(), True), config)
        >>> result = step(step.parameters, StepBatch(tokens, mask))

    Args:
        module: what ``attach`` returned, its arrays in memory; the step must be its only user.
        config: the run: checkpoints, blocks in flight, chunk of the loss, packing.
        how: ``whole`` (whole-graph step), ``stepped`` (blockwise step) or ``auto``: blockwise
            wherever blocks are computed again in the backward pass, if the model can be taken
            apart.

    Raises:
        ConfigError: ``how`` is none of these.
        UnsupportedError: ``how`` is ``stepped`` and the model cannot be taken apart, or the model
            cannot keep packed rows apart.
    """
    check_choice("how", how, CHOICES)
    note = ""
    try:
        stack = BlockStack(module)
        stack.check()
    except UnsupportedError as error:
        if how == "stepped":
            raise
        stack = None
        config = replace(config, grad_checkpoint=False, loss_chunk=0)
        note = (
            "step: whole, neither checkpoints nor a chunked loss, because the model cannot be "
            f"taken apart: {error}"
        )
    step: TrainStep
    if stack and (how == "stepped" or how == "auto" and config.grad_checkpoint):
        step = BlockwiseStep(module, config)
    else:
        step = WholeGraphStep(module, config, note)
    if not config.pack:
        return step
    logits = _logits(module, stack)
    one_pass = takes_batches(logits, config.max_seq_length - 1)
    return step if one_pass else RowByRow(step)


def _logits(
    module: nn.Module, stack: BlockStack | None
) -> Callable[[mx.array, mx.array | None], mx.array]:
    """Return the model as a function from tokens and segments, ``(batch, length)``, to logits."""
    if stack:
        return lambda tokens, segments: stack.logits(tokens, segments, last=8)
    return lambda tokens, segments: run(module, tokens, segments)


class RowByRow:
    """A step for models whose attention takes one mask for all rows of a batch.

    Each packed row passes through another step by itself, and the results are added up.

    Args:
        step: what computes one row; see ``TrainStep`` for the attributes, which are its own.
    """

    def __init__(self, step: TrainStep) -> None:
        self._step = step
        self.module = step.module
        self.parameters = step.parameters
        self.how = step.how
        self.notes = (
            *step.notes,
            "packed rows pass one at a time: this model takes one mask for all",
        )

    @property
    def traces(self) -> int:
        """Functions compiled so far."""
        return self._step.traces

    def __call__(self, parameters: Arrays, batch: StepBatch) -> LossAndGradients:
        """Return loss and gradients of a batch, computed row by row; see ``TrainStep``."""
        if batch.segments is None:
            return self._step(parameters, batch)
        first, *others = _rows(batch)
        total = self._step(parameters, first)
        mx.eval(total)
        for row in others:
            total = total.plus(self._step(parameters, row))
            mx.eval(total)
        return total


def _rows(batch: StepBatch) -> list[StepBatch]:
    """Return each packed row as a batch of one, ``(1, length)``, with a key of its own."""
    assert batch.segments is not None
    count = len(batch.tokens)
    keys: list[mx.array | None] = [None] * count
    if batch.key is not None:
        keys = list(mx.random.split(batch.key, count))
    rows = []
    for i, key in enumerate(keys):
        row = slice(i, i + 1)
        rows.append(StepBatch(batch.tokens[row], batch.mask[row], key, batch.segments[row]))
    return rows
