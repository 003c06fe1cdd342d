"""The training loop: a generator of events, one for each optimizer step. Shows nothing.

A step is a function of the config, the parameters and its own number: rows, dropout and learning
rate follow from these. So a run that is stopped, killed and resumed makes the same steps, bit for
bit, as one that never was. Where several processes train together, each computes its rows of every
batch; whatever decides how the run goes on is the same in all of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from qlab.core.config.train import TrainConfig
from qlab.core.progress import Progress
from qlab.core.train.events import Mark, StepEvent
from qlab.core.train.rows import Batch
from qlab.core.train.schedule import learning_rate
from qlab.engine.data.batches import Feed
from qlab.engine.step.protocol import LossAndGradients, StepBatch, TrainStep
from qlab.engine.train.checkpoint import Checkpoints, TrainState
from qlab.engine.train.distributed import ALONE, Ranks
from qlab.engine.train.update import Update, Updated
from qlab.engine.train.validate import Nats, nats
from qlab.errors import SaveError
from qlab.runtime.limits import Guard

Events = Generator[StepEvent | Progress, None, Any]
_MOST_SKIPPED = (
    5  # steps in a row without a finite loss and gradient, after which going on is pointless
)
_LEAST_STEPS = 10  # between validations that were not asked for
_VALIDATIONS = 4  # at least, in a whole run
_GUARDED = "The memory guard ended the run"


@dataclass
class Task:
    """What a run is made of.

    Attributes:
        step: what ``make_step`` returned.
        update: sums → new parameters.
        feed: batches by number.
        held_out: batches of a validation; may be empty.
        config: the run.
        guard: memory.
        checkpoints: where to write, or None.
        on_good: called with the state after every validation and checkpoint, and at the end.
        wanted_rate: a new base rate that a user has set, taken up by the next step.
        wanted_end: why the run shall end after the present step, or an empty string; one process's
            word counts for all.
        ranks: the processes that train together.
        marks: what has happened since the last event.
        other_nbytes: what MLX holds beside the run, such as the model before it was quantized.
        peak_nbytes: most that a step has taken so far, by itself.
        own_nbytes: of the model and the optimizer's state, once known.
    """

    step: TrainStep
    update: Update
    feed: Feed
    held_out: tuple[Batch, ...]
    config: TrainConfig
    guard: Guard
    checkpoints: Checkpoints | None = None
    on_good: Callable[[TrainState], None] = lambda state: None
    wanted_rate: float | None = None
    wanted_end: str = ""
    ranks: Ranks = ALONE
    marks: list[Mark] = field(default_factory=list)
    other_nbytes: int = 0
    peak_nbytes: int = 0
    own_nbytes: int = 0

    @property
    def iters(self) -> int:
        """Optimizer steps in all."""
        return self.feed.iters

    @property
    def steps_per_eval(self) -> int:
        """Steps between validations."""
        if self.config.steps_per_eval:
            return self.config.steps_per_eval
        quarter = round(self.feed.per_epoch / self.config.grad_accumulation_steps / 4)
        return max(min(max(quarter, _LEAST_STEPS), self.iters // _VALIDATIONS), 1)


def train_steps(task: Task, state: TrainState) -> Events:
    """Train from where the state stands to the end.

    Args:
        task: the run.
        state: changed in place, and consistent whenever the generator waits.

    Yields:
        A ``StepEvent`` after each optimizer step (and one before the first, if there are rows held
        out), and ``Progress`` where a step or a validation takes several batches.

    Returns:
        Why it ended, in words; empty if all steps are done.
    """
    saved = state.step
    with task.guard.limits():
        try:
            if state.step == 0 and task.held_out and not state.history:
                _meter(task, state, None)
                value = yield from _validation(task, state)
                state.history.append(_first(task, value))
                yield state.history[-1]
            while state.step < task.iters:
                reason = yield from _whole_step(task, state)
                if state.step % task.config.steps_per_save == 0 and state.step < task.iters:
                    saved = _save(task, state)
                state.history[-1] = replace(state.history[-1], marks=tuple(task.marks))
                task.marks.clear()
                yield state.history[-1]
                if reason:
                    return reason
            return ""
        finally:
            if state.step > saved:
                _save(task, state)
            task.on_good(state)


def _first(task: Task, val_loss: float) -> StepEvent:
    nan = math.nan
    active = mx.get_active_memory() - task.other_nbytes
    return StepEvent(0, 0.0, nan, nan, nan, 0, 0, 0, 0.0, nan, active, active, val_loss)


def _meter(task: Task, state: TrainState, sums: LossAndGradients | None) -> None:
    """Begin to measure: what others hold or take between two steps is not the run's."""
    if not task.own_nbytes:  # what it is made of changes, how much it is does not
        arrays = [*tree_flatten(task.step.module.parameters()), *state.optimizer.items()]
        task.own_nbytes = sum(array.nbytes for _, array in arrays)
    own = task.own_nbytes + (sum(array.nbytes for array in sums.grads.values()) if sums else 0)
    task.other_nbytes = max(mx.get_active_memory() - own, 0)
    mx.reset_peak_memory()


def _measured(task: Task) -> None:
    task.peak_nbytes = max(task.peak_nbytes, mx.get_peak_memory() - task.other_nbytes)


def _whole_step(task: Task, state: TrainState) -> Generator[Progress, None, str]:
    """Make one optimizer step and what is due after it; return why the run must end, if it must."""
    if task.wanted_rate is not None:
        state.learning_rate = task.wanted_rate
        task.wanted_rate = None
        task.marks.append(Mark("learning_rate", f"learning rate {state.learning_rate:g}"))
    rate = learning_rate(task.config, state.learning_rate, state.step, task.iters)
    new, batches, seconds = yield from _one_update(task, state, rate)
    reason = _taken(task, state, new, batches)
    # from here to the event nothing waits: whoever stops the run finds both the step and its event,
    # or neither
    tokens = sum(batch.real for batch in batches)
    state.step = state.step + 1
    state.seconds = state.seconds + seconds
    state.tokens = state.tokens + tokens
    event = StepEvent(
        step=state.step,
        epoch=state.step * task.config.grad_accumulation_steps / task.feed.per_epoch,
        loss=new.loss.item(),
        learning_rate=rate,
        grad_norm=new.grad_norm.item(),
        targets=sum(batch.targets for batch in batches),
        tokens=tokens,
        padded=sum(batch.tokens.size for batch in batches),
        seconds=state.seconds,
        tokens_per_second=tokens / max(seconds, 1e-9),
        active_nbytes=mx.get_active_memory() - task.other_nbytes,
        peak_nbytes=task.peak_nbytes,
    )
    state.history.append(event)
    if task.held_out and (state.step % task.steps_per_eval == 0 or state.step == task.iters):
        val_loss = yield from _validation(task, state)
        state.history[-1] = replace(event, val_loss=val_loss)
        reason = reason or _judged(task, state, val_loss)
    return reason or _told_to_end(task)


def _told_to_end(task: Task) -> str:
    """Return why memory, or somebody, wants the run to end now, in any of the processes."""
    danger = task.guard.reason()
    reason = task.ranks.agreed(
        f"{_GUARDED}: {danger}. The adapter as it is was kept." if danger else task.wanted_end
    )
    if reason.startswith(_GUARDED):
        task.marks.append(Mark("guard", reason))
    return reason


def _one_update(
    task: Task, state: TrainState, rate: float
) -> Generator[Progress, None, tuple[Updated, list[Batch], float]]:
    """Sum over the step's batches and update; nothing is taken over yet."""
    count = task.config.grad_accumulation_steps
    seconds = 0.0
    batches = []
    sums: LossAndGradients | None = None
    for i in range(count):
        began = time.perf_counter()
        _meter(task, state, sums)
        number = state.step * count + i
        batches.append(task.feed.batch(number))
        found = _sums(task, state, task.ranks.share(batches[-1]), number)
        sums = found if sums is None else sums.plus(found)
        if i + 1 < count:
            mx.eval(sums)
            _measured(task)
            seconds += time.perf_counter() - began
            yield Progress("training", i + 1, count)
    if (
        task.ranks.size > 1
    ):  # as one vector: hundreds of small arrays would take longer to send than to sum
        sums = task.ranks.total(sums._replace(grads=task.update.kept(sums.grads)))
    gathered = task.update.gather(sums)
    del sums, found  # or each gradient would be there twice
    mx.eval(gathered)
    new = task.update(state.parameters, state.optimizer, gathered, mx.array(rate, mx.float32))
    mx.eval(new)
    _measured(task)
    return new, batches, seconds + time.perf_counter() - began


def _sums(task: Task, state: TrainState, batch: Batch, number: int) -> LossAndGradients:
    """Compute what a batch adds up to; one without rows is nothing."""
    if not batch.numbers:
        return LossAndGradients(
            mx.array(0.0),
            {path: mx.zeros_like(array) for path, array in state.parameters.items()},
            mx.array(0.0),
        )
    step_batch = StepBatch(
        tokens=mx.array(batch.tokens),
        mask=mx.array(batch.mask),
        key=task.ranks.key(_key(task.config, number)),
        segments=None if batch.segments is None else mx.array(batch.segments),
    )
    sums = task.step(state.parameters, step_batch)
    return (
        sums.in_dtypes_of(state.parameters)
        if task.config.grad_accumulation_steps * task.ranks.size > 1
        else sums
    )


def _key(config: TrainConfig, number: int) -> mx.array:
    """Random key of a batch: a function of the seed and the batch's number only."""
    return mx.random.key((config.seed * 2**32 + number) % 2**64)


def _taken(task: Task, state: TrainState, new: Updated, batches: list[Batch]) -> str:
    """Take an update over if it is finite; return why the run must end, if it must."""
    if new.finite.item():
        state.parameters = new.parameters
        state.optimizer = new.state
        state.skipped = 0
        return ""
    state.skipped += 1
    rows = ", ".join(str(n) for batch in batches for row in batch.numbers for n in row)
    what = "loss" if not math.isfinite(new.loss.item()) else "gradient"
    text = f"step {state.step + 1} left out: its {what} is not finite (rows {rows}); the adapter is as before it"
    task.marks.append(Mark("skipped", text))
    if task.config.on_nonfinite == "stop":
        return f"Stopped at {text}."
    if state.skipped >= _MOST_SKIPPED:
        return f"Stopped: {state.skipped} steps in a row had no finite loss or gradient. Lower the learning rate."
    return ""


def _validation(task: Task, state: TrainState) -> Generator[Progress, None, float]:
    """Return the loss on the rows held out, in nats per target."""
    total = Nats()
    for i, batch in enumerate(task.held_out):
        own = task.ranks.share(batch)
        if own.numbers:
            total += nats(task.step.module, state.parameters, own)
        yield Progress("validating", i + 1, len(task.held_out))
    total = task.ranks.all_nats(total)
    task.on_good(state)
    return total.mean


def _judged(task: Task, state: TrainState, val_loss: float) -> str:
    """Keep the best; return why the run must end, if no better one is to be expected."""
    if val_loss < state.best_val_loss:
        state.best_val_loss = val_loss
        state.best_step = state.step
        state.stale = 0
        task.marks.append(Mark("best", f"best so far: validation loss {val_loss:.4g}"))
        if task.checkpoints:
            _written(task, lambda: task.checkpoints.save_best(state))
        return ""
    state.stale += 1
    if task.config.early_stop and state.stale >= task.config.early_stop:
        text = f"no better validation loss for {state.stale} validations; the best was at step {state.best_step}"
        task.marks.append(Mark("early_stop", text))
        return f"Stopped early: {text}."
    return ""


def _save(task: Task, state: TrainState) -> int:
    """Write a checkpoint; return the step up to which the run is safe."""
    if task.checkpoints:
        written = replace(state, optimizer=task.update.state_by_path(state.optimizer))
        _written(task, lambda: task.checkpoints.save(written), Mark("checkpoint", "checkpoint"))
    task.on_good(state)
    return state.step


def _written(task: Task, write: Callable[[], Any], mark: Mark | None = None) -> None:
    """Write.

    A full disk is told on the time line and does not end a run whose weights are in memory.
    """
    try:
        write()
    except SaveError as error:
        mark = Mark("checkpoint", f"not written: {error}")
    if mark:
        task.marks.append(mark)
