"""Which training a machine is good for: 16-bit weights, quantized ones or a smaller model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qlab.core.config.quant import QuantConfig, QuantPlan
from qlab.core.display import Displayed, size_text
from qlab.core.machine import Machine
from qlab.core.memory.estimate import MemoryEstimate
from qlab.core.memory.setup import Setup
from qlab.core.memory.solve import Estimator

_ROWS_A_STEP = 16  # rows that one optimizer step should see
_BATCHES = (16, 8, 4, 2, 1)
# checkpoints cost time, so they come in only where fewer than four rows fit without them
_CHECKPOINTS_AND_FEWEST_ROWS = ((False, 4), (True, 1), (False, 1))
_BITS = (8, 6, 4, 3)


@dataclass(frozen=True)
class Advice(Displayed):
    """Which training to choose on a machine.

    Example:
        >>> advice = qlab.estimate("demo").advise("16 GB Mac")
        >>> advice.choice
        'LoRA on 16-bit weights'
        >>> print(advice.code)          # the settings, as Python

    Attributes:
        choice: ``LoRA on 16-bit weights``, ``QLoRA`` or ``a smaller model``.
        reason: in words, with the sizes that decide.
        estimate: of the settings advised; None if nothing fits.
    """

    choice: str
    reason: str
    estimate: MemoryEstimate | None

    @property
    def code(self) -> str:
        """The Python that makes the settings advised; empty if nothing fits."""
        return self.estimate.code if self.estimate else ""

    def __repr__(self) -> str:
        text = f"{self.choice}: {self.reason}"
        return f"{text}\n{self.code}" if self.code else text


def advise(est: MemoryEstimate, at: Estimator, machine: Machine) -> Advice:
    """Choose the most exact weights that let a step fit, then the largest and fastest batch.

    16-bit weights come first: no rounding error, and no dequantization in every product. Then 8, 6
    and 4 bits, and 3. Rows stay as long as they are.

    Args:
        est: its model, adapter and length of rows count.
        at: estimates other setups.
        machine: the budget.
    """
    came_quantized = est.spec.storage is not None
    for plan in _plans(est):
        setup = _largest_batch(replace(est.setup, plan=plan), at, machine)
        if setup is not None:
            choice = "QLoRA" if plan or came_quantized else "LoRA on 16-bit weights"
            advised = at(setup)
            return Advice(choice, _reason(est, advised, at, machine), advised)
    return Advice("a smaller model", _nothing_fits(est, at, machine), None)


def _plans(est: MemoryEstimate) -> Sequence[QuantPlan | None]:
    """Return the storages to try, the most exact first; quantized weights stay as they came."""
    if est.spec.storage:
        return [None]
    quantized = [QuantPlan(QuantConfig("affine", bits)) for bits in _BITS]
    return [None, *quantized]


def _largest_batch(setup: Setup, at: Estimator, machine: Machine) -> Setup | None:
    """Return the setup with the largest batch that surely fits, or None if not one row does."""
    for checkpoint, fewest in _CHECKPOINTS_AND_FEWEST_ROWS:
        for rows in _BATCHES:
            if rows < fewest:
                continue
            train = replace(
                setup.train,
                batch_size=rows,
                grad_checkpoint=checkpoint,
                grad_accumulation_steps=max(_ROWS_A_STEP // rows, 1),
            )
            candidate = replace(setup, train=train)
            if at(candidate).high_nbytes <= machine.free_nbytes:
                return candidate
    return None


def _smallest_step(setup: Setup, plan: QuantPlan | None) -> Setup:
    """Return a setup with another storage and the least memory a run can take: one row."""
    train = replace(setup.train, batch_size=1, grad_checkpoint=True)
    return replace(setup, plan=plan, train=train)


def _reason(est: MemoryEstimate, advised: MemoryEstimate, at: Estimator, machine: Machine) -> str:
    free = f"the {size_text(machine.free_nbytes)} of {machine.label}"
    place = f"{size_text(advised.total_nbytes)} of {free}"
    if advised.setup.plan is None and est.spec.storage:
        return f"the weights are quantized already; a step takes {place}."
    if advised.setup.plan is None:
        gain = "so there is no rounding error to train around and nothing to dequantize"
        return f"16-bit weights fit ({place}), {gain}."
    one_row = at(_smallest_step(advised.setup, None)).total_nbytes
    rows = advised.setup.train.batch_size
    return (
        f"on 16-bit weights even one row with checkpoints takes {size_text(one_row)}; "
        f"as {advised.setup.label} a step of {rows} rows takes {place}."
    )


def _nothing_fits(est: MemoryEstimate, at: Estimator, machine: Machine) -> str:
    smallest = _plans(est)[-1]
    need = at(_smallest_step(est.setup, smallest)).total_nbytes
    least = "the weights as stored" if est.spec.storage else "3-bit weights"
    length = est.setup.train.max_seq_length
    return (
        f"even with {least}, checkpoints and one row of {length} tokens a step needs "
        f"{size_text(need)}, and {machine.label} has {size_text(machine.free_nbytes)}. "
        "Take shorter rows or a smaller model."
    )
