"""What to do when a run does not fit, and which kind of training a machine is good for.

Asks estimates, knows no model.

The order of changes is a judgement of quality, not a measurement: what leaves the gradient as it is
comes first, then what makes the adapter smaller, then what cuts the text, then fewer bits
(docs/guide/memory.md gives the reasons).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from qlab.core.arithmetic import ceil_div
from qlab.core.config.code import setup_code
from qlab.core.config.quant import QuantConfig, QuantPlan
from qlab.core.display import Displayed, size_text
from qlab.core.machine import Machine
from qlab.core.memory.estimate import MemoryEstimate
from qlab.core.memory.setup import Setup
from qlab.errors import ConfigError

QUALITY = ("none", "small", "some", "large")
_ROWS_A_STEP = 16  # rows that one optimizer step should see
_BITS_QUALITY = {8: 0, 6: 0, 5: 1, 4: 1, 3: 2, 2: 3, 1: 3}


@dataclass(frozen=True)
class Change:
    """One change of a setup that makes it fit.

    Attributes:
        name: of the setting.
        now: its value.
        then: its value after the change.
        total_nbytes: expected peak after it.
        quality: expected cost: ``none``, ``small``, ``some`` or ``large``.
        remark: what it costs, in words.
        setup: the changed setup.
    """

    name: str
    now: Any
    then: Any
    total_nbytes: int
    quality: str
    remark: str
    setup: Setup

    def __str__(self) -> str:
        arrow = f"{self.name} {self.now} → {self.then}"
        return f"{arrow}: {size_text(self.total_nbytes)}, cost to quality {self.quality} ({self.remark})"


def changes(est: MemoryEstimate, machine: Machine) -> tuple[Change, ...]:
    """Return the single changes that make it fit, the least cost first; nothing if it fits already."""
    if est.total_nbytes <= machine.free_nbytes:
        return ()
    found = [
        change for change in _candidates(est, machine) if change.total_nbytes <= machine.free_nbytes
    ]
    return tuple(sorted(found, key=lambda change: QUALITY.index(change.quality)))


def _candidates(est: MemoryEstimate, machine: Machine) -> Iterator[Change]:
    """Every change worth a thought, the cheaper in time first among equals."""
    setup = est.setup
    train = est.setup.train

    def made(name: str, now: Any, then: Any, setup: Setup, quality: int, remark: str) -> Change:
        return Change(
            name, now, then, est.again(setup).total_nbytes, QUALITY[quality], remark, setup
        )

    if not train.loss_chunk:
        yield made(
            "loss_chunk", 0, 512, setup.with_value("loss_chunk", 512), 0, "same numbers, as fast"
        )
    if rows := _solved(est, "batch_size", machine, train.batch_size):
        steps = ceil_div(train.batch_size * train.grad_accumulation_steps, rows)
        smaller = replace(train, batch_size=rows, grad_accumulation_steps=steps)
        remark = f"with grad_accumulation_steps={steps}: same rows a step, somewhat slower"
        yield made("batch_size", train.batch_size, rows, replace(setup, train=smaller), 0, remark)
    if not train.grad_checkpoint:
        remark = "same numbers; every block is computed twice"
        yield made(
            "grad_checkpoint", False, True, setup.with_value("grad_checkpoint", True), 0, remark
        )
    if rank := _solved(est, "rank", machine, setup.adapter.rank):
        yield made(
            "rank",
            setup.adapter.rank,
            rank,
            setup.with_value("rank", rank),
            1,
            "a smaller adapter, alpha as it was",
        )
    now = setup.adapter.num_layers if setup.adapter.num_layers > 0 else est.blocks
    if blocks := _solved(est, "num_layers", machine, now):
        yield made(
            "num_layers",
            now,
            blocks,
            setup.with_value("num_layers", blocks),
            2,
            "the first blocks stay as they are",
        )
    if length := _solved(est, "max_seq_length", machine, train.max_seq_length):
        setup_ = setup.with_value("max_seq_length", length)
        yield made("max_seq_length", train.max_seq_length, length, setup_, 2, "longer rows are cut")
    yield from _fewer_bits(est, machine, made)


def _solved(est: MemoryEstimate, name: str, machine: Machine, now: int) -> int | None:
    """Return the largest value that fits if it is a reduction, else None."""
    try:
        value = est.solve(name, machine)
    except ConfigError:
        return None
    return value if value < now else None


def _fewer_bits(est: MemoryEstimate, machine: Machine, made: Any) -> Iterator[Change]:
    """The most bits that fit, of the scheme in use; affine if the weights are not quantized yet."""
    plan = est.setup.plan
    if plan is None and est.spec.storage:
        return
    default = plan.default if plan else QuantConfig("affine", 8)
    now = default.bits if plan else 16
    for bits in sorted((b for b in default.scheme.bits if b < now), reverse=True):
        setup = replace(
            est.setup, plan=QuantPlan(QuantConfig(default.mode, bits, default.group_size))
        )
        if est.again(setup).total_nbytes <= machine.free_nbytes:
            yield made(
                "bits", now, bits, setup, _BITS_QUALITY.get(bits, 2), f"weights as {setup.label}"
            )
            return


@dataclass(frozen=True)
class Advice(Displayed):
    """Which training to choose on a machine.

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
        """The Python that makes the settings advised."""
        return (
            setup_code(
                self.estimate.setup.plan, self.estimate.setup.adapter, self.estimate.setup.train
            )
            if self.estimate
            else ""
        )

    def __repr__(self) -> str:
        return f"{self.choice}: {self.reason}" + (f"\n{self.code}" if self.code else "")


def advise(est: MemoryEstimate, machine: Machine) -> Advice:
    """Choose the most exact weights with which a step of the wanted length fits, then the largest
    and fastest batch.

    16-bit weights come first: no rounding error, and no dequantization in every product. Then 8, 6
    and 4 bits, and 3.
    """
    storage = est.spec.storage
    plans = (
        [None]
        if storage
        else [None, *(QuantPlan(QuantConfig("affine", bits)) for bits in (8, 6, 4, 3))]
    )
    floor = 0
    for plan in plans:
        setup = _largest(est, replace(est.setup, plan=plan), machine)
        if setup is not None:
            found = est.again(setup)
            return Advice(
                "QLoRA" if plan or storage else "LoRA on 16-bit weights",
                _reason(est, found, machine),
                found,
            )
        one = replace(est.setup.train, batch_size=1, grad_checkpoint=True)
        floor = est.again(replace(est.setup, plan=plan, train=one)).total_nbytes
    length = est.setup.train.max_seq_length
    least = "the weights as stored" if storage else "3-bit weights"
    reason = (
        f"even with {least}, checkpoints and one row of {length} tokens a step needs {size_text(floor)}, and {machine.label} "
        f"has {size_text(machine.free_nbytes)}. Take shorter rows or a smaller model."
    )
    return Advice("a smaller model", reason, None)


def _largest(est: MemoryEstimate, setup: Setup, machine: Machine) -> Setup | None:
    """The largest batch that surely fits, without checkpoints if four rows fit so.

    None if not even one row does.
    """
    for checkpoint, least in ((False, 4), (True, 1), (False, 1)):
        for rows in (16, 8, 4, 2, 1):
            steps = max(_ROWS_A_STEP // rows, 1)
            train = replace(
                setup.train,
                batch_size=rows,
                grad_checkpoint=checkpoint,
                grad_accumulation_steps=steps,
            )
            if (
                rows >= least
                and est.again(replace(setup, train=train)).high_nbytes <= machine.free_nbytes
            ):
                return replace(setup, train=train)
    return None


def _reason(est: MemoryEstimate, found: MemoryEstimate, machine: Machine) -> str:
    place = f"{size_text(found.total_nbytes)} of the {size_text(machine.free_nbytes)} of {machine.label}"
    if found.setup.plan is None:
        if est.spec.storage:
            return f"the weights are quantized already; a step takes {place}."
        return f"16-bit weights fit ({place}), so there is no rounding error to train around and nothing to dequantize."
    one = replace(found.setup.train, batch_size=1, grad_checkpoint=True)
    whole = est.again(replace(found.setup, plan=None, train=one)).total_nbytes
    return (
        f"on 16-bit weights even one row with checkpoints takes {size_text(whole)}; "
        f"as {found.setup.label} a step of {found.setup.train.batch_size} rows takes {place}."
    )
