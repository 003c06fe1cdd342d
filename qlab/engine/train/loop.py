"""The training loop: a generator of events, one for each optimizer step. Shows nothing.

A step is a function of the config, the parameters and its own number: rows, dropout and learning
rate follow from these. So a run that is stopped, killed and resumed makes the same steps, bit for
bit, as one that never was. Where several processes train together, each computes its rows of every
batch; whatever decides how the run goes on is the same in all of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from dataclasses import replace
from typing import NamedTuple, cast

import mlx.core as mx
from mlx.utils import tree_flatten

from qlab.core.config.train import TrainConfig
from qlab.core.progress import Progress
from qlab.core.train.events import Mark, StepEvent
from qlab.core.train.rows import Batch
from qlab.core.train.schedule import learning_rate
from qlab.engine.step.protocol import LossAndGradients, StepBatch
from qlab.engine.train.checkpoint import TrainState
from qlab.engine.train.saving import judge_validation, save_checkpoint
from qlab.engine.train.task import Task
from qlab.engine.train.update import Updated
from qlab.engine.train.validate import Nats, nats

Events = Generator[StepEvent | Progress, None, str]
_MOST_SKIPPED = 5  # steps in a row without a finite loss and gradient; more of them are pointless
_GUARDED = "The memory guard ended the run"


class _Step(NamedTuple):
    """One optimizer step that is computed but not yet part of the run.

    Attributes:
        new: parameters and optimizer state after it.
        batches: what it was computed on.
        seconds: time that it took.
    """

    new: Updated
    batches: list[Batch]
    seconds: float


def train_steps(task: Task, state: TrainState) -> Events:
    """Train from where the state stands to the end.

    Example:
        >>> task, state, notes = prepare_run(inputs, on_good=lambda state: None)
        >>> losses = [event.loss for event in train_steps(task, state)]

    Args:
        task: the run.
        state: changed in place, and consistent whenever the generator waits.

    Yields:
        A ``StepEvent`` after each optimizer step (and one before the first, if there are rows held
        out), and ``Progress`` where a step or a validation takes several batches.

    Returns:
        Why it ended, in words; empty if all steps are done.
    """
    saved_step = state.step
    with task.guard.limits():
        try:
            if state.step == 0 and task.held_out and not state.history:
                yield from _first_validation(task, state)
            while state.step < task.iters:
                reason = yield from _whole_step(task, state)
                due = state.step % task.config.steps_per_save == 0
                if due and state.step < task.iters:
                    saved_step = save_checkpoint(task, state)
                state.history[-1] = replace(state.history[-1], marks=tuple(task.marks))
                task.marks.clear()
                yield state.history[-1]
                if reason:
                    return reason
            return ""
        finally:
            if state.step > saved_step:
                save_checkpoint(task, state)
            task.on_good(state)


def _first_validation(task: Task, state: TrainState) -> Generator[StepEvent | Progress, None, None]:
    """Validate before the first step."""
    _start_meter(task, state)
    val_loss = yield from _validation(task, state)
    active_nbytes = task.meter.active_nbytes
    event = StepEvent(
        step=0,
        epoch=0.0,
        loss=math.nan,
        learning_rate=math.nan,
        grad_norm=math.nan,
        targets=0,
        tokens=0,
        padded=0,
        seconds=0.0,
        tokens_per_second=math.nan,
        active_nbytes=active_nbytes,
        peak_nbytes=active_nbytes,
        val_loss=val_loss,
    )
    state.history.append(event)
    yield event


def _start_meter(task: Task, state: TrainState, sums: LossAndGradients | None = None) -> None:
    """Start to measure the memory of the next batch, or of the first validation."""
    if not task.meter.base_nbytes:  # these arrays are replaced, but their size stays the same
        arrays = [*tree_flatten(task.step.module.parameters()), *state.optimizer.items()]
        task.meter.base_nbytes = sum(array.nbytes for _, array in arrays)
    gradients = sums.grads.values() if sums else ()
    task.meter.start(sum(array.nbytes for array in gradients))


def _whole_step(task: Task, state: TrainState) -> Generator[Progress, None, str]:
    """Make one optimizer step and what is due after it; return why the run must end, if it must."""
    if task.wanted_rate is not None:
        state.learning_rate = task.wanted_rate
        task.wanted_rate = None
        task.marks.append(Mark("learning_rate", f"learning rate {state.learning_rate:g}"))
    rate = learning_rate(task.config, state.learning_rate, state.step, task.iters)
    step = yield from _compute_step(task, state, rate)
    # from here to the event nothing waits: a run that is stopped has both the step and its event,
    # or neither
    reason = _take_over(task, state, step)
    state.history.append(_event(task, state, step, rate))
    if task.held_out and (state.step % task.steps_per_eval == 0 or state.step == task.iters):
        val_loss = yield from _validation(task, state)
        state.history[-1] = replace(state.history[-1], val_loss=val_loss)
        reason = reason or judge_validation(task, state, val_loss)
    return reason or _requested_end(task)


def _event(task: Task, state: TrainState, step: _Step, rate: float) -> StepEvent:
    """Return the event of a step that the state has just taken over."""
    batches = step.batches
    tokens = sum(batch.real for batch in batches)
    return StepEvent(
        step=state.step,
        epoch=state.step * task.config.grad_accumulation_steps / task.feed.per_epoch,
        loss=cast(float, step.new.loss.item()),
        learning_rate=rate,
        grad_norm=cast(float, step.new.grad_norm.item()),
        targets=sum(batch.targets for batch in batches),
        tokens=tokens,
        padded=sum(batch.tokens.size for batch in batches),
        seconds=state.seconds,
        tokens_per_second=tokens / max(step.seconds, 1e-9),
        active_nbytes=task.meter.active_nbytes,
        peak_nbytes=task.meter.peak_nbytes,
    )


def _requested_end(task: Task) -> str:
    """Return why memory, or a user, wants the run to end now, in any of the processes."""
    danger = task.guard.reason()
    reason = task.wanted_end
    if danger:
        reason = f"{_GUARDED}: {danger}. The adapter as it is was kept."
    reason = task.ranks.agreed(reason)
    if reason.startswith(_GUARDED):
        task.marks.append(Mark("guard", reason))
    return reason


def _compute_step(task: Task, state: TrainState, rate: float) -> Generator[Progress, None, _Step]:
    """Sum over the step's batches and update; the state stays as it is."""
    count = task.config.grad_accumulation_steps
    seconds = 0.0
    began = time.perf_counter()
    batches: list[Batch] = []
    sums: LossAndGradients | None = None
    for i in range(count):
        began = time.perf_counter()
        _start_meter(task, state, sums)
        number = state.step * count + i
        batches.append(task.feed.batch(number))
        result = _loss_and_gradients(task, state, task.ranks.share(batches[-1]), number)
        sums = result if sums is None else sums.plus(result)
        del result  # or each gradient would be in memory twice
        if i + 1 < count:
            mx.eval(sums)
            task.meter.read()
            seconds += time.perf_counter() - began
            yield Progress("training", i + 1, count)
    assert sums is not None  # a step has at least one batch
    if task.ranks.size > 1:
        # sent as one vector: hundreds of small arrays would take longer to send than to sum
        sums = task.ranks.total(sums._replace(grads=task.update.flat(sums.grads)))
    gathered = task.update.gather(sums)
    del sums  # as above
    mx.eval(gathered)
    new = task.update(state.parameters, state.optimizer, gathered, mx.array(rate, mx.float32))
    mx.eval(new)
    task.meter.read()
    return _Step(new, batches, seconds + time.perf_counter() - began)


def _loss_and_gradients(
    task: Task, state: TrainState, batch: Batch, number: int
) -> LossAndGradients:
    """Compute one batch; a batch without rows adds nothing."""
    if not batch.numbers:
        zeros = {path: mx.zeros_like(array) for path, array in state.parameters.items()}
        return LossAndGradients(loss=mx.array(0.0), grads=zeros, count=mx.array(0.0))
    step_batch = StepBatch(
        tokens=mx.array(batch.tokens),
        mask=mx.array(batch.mask),
        key=task.ranks.key(_key(task.config, number)),
        segments=None if batch.segments is None else mx.array(batch.segments),
    )
    result = task.step(state.parameters, step_batch)
    summed = task.config.grad_accumulation_steps * task.ranks.size > 1
    return result.in_dtypes_of(state.parameters) if summed else result


def _key(config: TrainConfig, number: int) -> mx.array:
    """Random key of a batch: a function of the seed and the batch's number only."""
    return mx.random.key((config.seed * 2**32 + number) % 2**64)


def _take_over(task: Task, state: TrainState, step: _Step) -> str:
    """Move the state on by a step; its numbers count only if they are finite.

    Returns:
        Why the run must end, or an empty string.
    """
    reason = ""
    if step.new.finite.item():
        state.parameters = step.new.parameters
        state.optimizer = step.new.state
        state.skipped = 0
    else:
        reason = _skip(task, state, step)
    state.step += 1
    state.seconds += step.seconds
    state.tokens += sum(batch.real for batch in step.batches)
    return reason


def _skip(task: Task, state: TrainState, step: _Step) -> str:
    """Leave out a step that is not finite; return why the run must end, if it must."""
    state.skipped += 1
    numbers = [n for batch in step.batches for row in batch.numbers for n in row]
    rows = ", ".join(map(str, numbers))
    what = "gradient" if mx.isfinite(step.new.loss).item() else "loss"
    text = (
        f"step {state.step + 1} left out: its {what} is not finite (rows {rows}); "
        "the adapter is as before it"
    )
    task.marks.append(Mark("skipped", text))
    if task.config.on_nonfinite == "stop":
        return f"Stopped at {text}."
    if state.skipped >= _MOST_SKIPPED:
        return (
            f"Stopped: {state.skipped} steps in a row had no finite loss or gradient. "
            "Lower the learning rate."
        )
    return ""


def _validation(task: Task, state: TrainState) -> Generator[Progress, None, float]:
    """Return the loss on the rows held out, in nats/token."""
    total = Nats()
    for i, batch in enumerate(task.held_out):
        share = task.ranks.share(batch)
        if share.numbers:
            total += nats(task.step.module, state.parameters, share)
        yield Progress("validating", i + 1, len(task.held_out))
    total = task.ranks.all_nats(total)
    task.on_good(state)
    return total.mean
