"""``Task``: a prepared run. The loop takes its steps; the session changes what the user asks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from qlab.core.config.train import TrainConfig
from qlab.core.train.events import Mark
from qlab.core.train.rows import Batch
from qlab.engine.data.batches import Feed
from qlab.engine.step.protocol import TrainStep
from qlab.engine.train.checkpoint import Checkpoints, TrainState
from qlab.engine.train.distributed import ALONE, Ranks
from qlab.engine.train.meter import MemoryMeter
from qlab.engine.train.update import Update
from qlab.runtime.limits import Guard

_LEAST_STEPS = 10  # between validations, unless a user asks for more of them
_VALIDATIONS = 4  # at least, in a whole run


def _ignore(state: TrainState) -> None:
    """Do nothing with a good state."""


@dataclass(kw_only=True)
class Task:
    """A prepared run: its step, update and batches, and what the user has asked for meanwhile.

    Attributes:
        step: computes loss and gradients of one batch.
        update: sums of gradients → new parameters.
        feed: batches by number.
        held_out: batches of a validation; may be empty.
        config: config of the run.
        guard: watches the memory.
        checkpoints: where to write, or None.
        on_good: called with the state after every validation and checkpoint, and at the end.
        ranks: the processes that train together.
        wanted_rate: a new base rate that a user has set, for the next step on.
        wanted_end: why the run shall end after the present step, or an empty string; the request of
            one process ends all.
        marks: what has happened since the last event.
        meter: memory that the run takes.
    """

    step: TrainStep
    update: Update
    feed: Feed
    held_out: tuple[Batch, ...]
    config: TrainConfig
    guard: Guard
    checkpoints: Checkpoints | None = None
    on_good: Callable[[TrainState], None] = _ignore
    ranks: Ranks = ALONE
    wanted_rate: float | None = None
    wanted_end: str = ""
    marks: list[Mark] = field(default_factory=list)
    meter: MemoryMeter = field(default_factory=MemoryMeter)

    @property
    def iters(self) -> int:
        """Optimizer steps in all."""
        return self.feed.iters

    @property
    def steps_per_eval(self) -> int:
        """Steps between validations."""
        if self.config.steps_per_eval:
            return self.config.steps_per_eval
        quarter_epoch = round(self.feed.per_epoch / self.config.grad_accumulation_steps / 4)
        steps = max(quarter_epoch, _LEAST_STEPS)
        return max(min(steps, self.iters // _VALIDATIONS), 1)
