"""What a training run reports step by step: events, marks on the time line, sample generations."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

MARKS = ("checkpoint", "best", "learning_rate", "skipped", "early_stop", "guard")


@dataclass(frozen=True)
class Mark:
    """Something worth a mark on the time line.

    Attributes:
        kind: one of ``MARKS``.
        text: in words, such as ``best so far: validation loss 2.31``.
    """

    kind: str
    text: str


@dataclass(frozen=True, kw_only=True)
class StepEvent:
    """One optimizer step.

    ``Trainer(callbacks=[…])`` are called with one after each step; ``t.events`` has all of them.

    Example:
        >>> def show(event):
        ...     print(event.step, event.loss, event.val_loss)
        >>> qlab.Trainer(a, rows, callbacks=[show]).run()

    Attributes:
        step: optimizer steps done, this one included; 0 only for the validation before the first.
        epoch: passes through the rows so far, such as 1.25.
        loss: mean loss of the step's targets in nats/token; NaN at step 0, or where it was not
            finite.
        learning_rate: learning rate of the step.
        grad_norm: global norm of the gradient before clipping; NaN at step 0.
        targets: tokens in the loss of the step.
        tokens: tokens that passed the model, padding not counted.
        padded: tokens that passed the model, padding counted.
        seconds: time in steps since the run began, pauses and validations not counted.
        tokens_per_second: speed of this step, padding not counted.
        active_nbytes: memory of the run after the step (other models in memory not counted).
        peak_nbytes: peak memory of the run so far.
        val_loss: in nats/token on rows held out, if it was measured after this step.
        marks: what else happened.
    """

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    targets: int
    tokens: int
    padded: int
    seconds: float
    tokens_per_second: float
    active_nbytes: int
    peak_nbytes: int
    val_loss: float | None = None
    marks: tuple[Mark, ...] = ()

    def record(self) -> dict[str, Any]:
        """Return a flat record for tables and reporters; marks as one text."""
        return {**asdict(self), "marks": "; ".join(mark.text for mark in self.marks)}


@dataclass(frozen=True)
class SampleGeneration:
    """What the model answered to a prompt at some step.

    Attributes:
        step: optimizer steps done.
        prompt: the prompt.
        text: the model's answer.
    """

    step: int
    prompt: str
    text: str
