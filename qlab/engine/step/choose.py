"""Picks the way in which a step is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qlab.core.config.train import TrainConfig
from qlab.engine.models.blocks import Stack, run
from qlab.engine.models.packed_rows import takes_batches
from qlab.engine.step.blockwise import Stepped
from qlab.engine.step.loss import Arrays, Sums
from qlab.engine.step.whole import Step
from qlab.errors import ConfigError, UnsupportedError


def make_step(module: nn.Module, config: TrainConfig, *, how: str = "auto") -> Any:
    """Return the step of a run.

    ``step(parameters, tokens, mask, key=None, segments=None) -> Sums``. Computes on few tokens.

    Args:
        module: what ``attach`` returned, its arrays in memory; nobody else may use it.
        config: checkpoints, blocks in flight, chunk of the loss, packing.
        how: ``whole`` (one graph), ``stepped`` (a block at a time) or ``auto``: stepped wherever
            blocks are computed again on the way back, if the model can be taken apart.

    Raises:
        ConfigError: no such way.
        UnsupportedError: the model cannot be computed so, or cannot keep packed rows apart.
    """
    if how not in WAYS:
        raise ConfigError(f"how={how!r} is not legal; choose one of {', '.join(WAYS)}.")
    note = ""
    try:
        stack = Stack(module)
        stack.check()
    except UnsupportedError as error:
        if how == "stepped":
            raise
        stack = None
        config = replace(config, grad_checkpoint=False, loss_chunk=0)
        note = f"step: whole, neither checkpoints nor a chunked loss, because the model cannot be taken apart: {error}"
    if stack and (how == "stepped" or how == "auto" and config.grad_checkpoint):
        step: Any = Stepped(module, config)
    else:
        step = Step(module, config)
        step.notes = (note or f"step: {step.how}, as one graph",)
    if config.pack and not takes_batches(_logits(module, stack), config.max_seq_length - 1):
        step = _RowByRow(step)
    return step


WAYS = ("auto", "whole", "stepped")


def _logits(
    module: nn.Module, stack: Stack | None
) -> Callable[[mx.array, mx.array | None], mx.array]:
    if stack:
        return lambda tokens, segments: stack.logits(tokens, segments, last=8)
    return lambda tokens, segments: run(module, tokens, segments)


class _RowByRow:
    """A step for models whose attention takes one mask for all rows.

    Packed rows pass one at a time, and are added up.
    """

    def __init__(self, step: Any) -> None:
        self._step = step
        self.notes = (
            *step.notes,
            "packed rows pass one at a time: this model takes one mask for all",
        )

    def __call__(
        self,
        parameters: Arrays,
        tokens: mx.array,
        mask: mx.array,
        key: mx.array | None = None,
        segments: mx.array | None = None,
    ) -> Sums:
        if segments is None:
            return self._step(parameters, tokens, mask, key)
        keys = [None] * len(tokens) if key is None else mx.random.split(key, len(tokens))
        total: Sums | None = None
        for i, own in enumerate(keys):
            row = slice(i, i + 1)
            sums = self._step(parameters, tokens[row], mask[row], own, segments[row])
            total = sums if total is None else total.plus(sums)
            mx.eval(total)
        return total  # type: ignore

    def __getattr__(self, name: str) -> Any:
        return getattr(self._step, name)
