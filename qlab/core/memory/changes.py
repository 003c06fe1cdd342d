"""Single changes of a setup that make it fit a machine, the least cost to quality first.

The order is a judgement of quality, not a measurement: what leaves the gradient as it is comes
first, then what makes the adapter smaller, then what cuts the text, then fewer bits
(docs/guide/memory.md gives the reasons).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from qlab.core.arithmetic import ceil_div
from qlab.core.config.quant import QuantConfig, QuantPlan
from qlab.core.display import size_text
from qlab.core.machine import Machine
from qlab.core.memory.estimate import MemoryEstimate
from qlab.core.memory.setup import Setup
from qlab.core.memory.solve import Estimator, solve
from qlab.errors import ConfigError

QUALITY = ("none", "small", "some", "large")  # expected cost to quality, ascending
_BITS_COST = {8: "none", 6: "none", 5: "small", 4: "small", 3: "some", 2: "large", 1: "large"}
_CHUNK = 512  # tokens whose logits exist at once: as fast as all of them


@dataclass(frozen=True, kw_only=True)
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
        cost = f"cost to quality {self.quality} ({self.remark})"
        return f"{arrow}: {size_text(self.total_nbytes)}, {cost}"


def changes(est: MemoryEstimate, at: Estimator, machine: Machine) -> tuple[Change, ...]:
    """Return the single changes that make an estimate's setup fit; nothing if it fits already.

    Args:
        est: what is to fit.
        at: estimates other setups.
        machine: the budget.
    """
    if est.total_nbytes <= machine.free_nbytes:
        return ()
    candidates = _Candidates(est, at, machine)
    fitting = [change for change in candidates if change.total_nbytes <= machine.free_nbytes]
    return tuple(sorted(fitting, key=lambda change: QUALITY.index(change.quality)))


@dataclass(frozen=True)
class _Candidates:
    """Changes worth a thought. Among those of equal cost to quality, the faster one comes first."""

    est: MemoryEstimate
    at: Estimator
    machine: Machine

    def __iter__(self) -> Iterator[Change]:
        yield from self._chunks_of_loss()
        yield from self._fewer_rows()
        yield from self._checkpoints()
        yield from self._smaller_rank()
        yield from self._fewer_blocks()
        yield from self._shorter_rows()
        yield from self._fewer_bits()

    def _chunks_of_loss(self) -> Iterator[Change]:
        setup = self.est.setup
        if not setup.train.loss_chunk:
            chunked = setup.with_value("loss_chunk", _CHUNK)
            yield self._change("loss_chunk", 0, _CHUNK, chunked, "none", "same numbers, as fast")

    def _fewer_rows(self) -> Iterator[Change]:
        setup = self.est.setup
        train = setup.train
        rows = self._solved("batch_size", train.batch_size)
        if rows is None:
            return
        rows_a_step = train.batch_size * train.grad_accumulation_steps
        steps = ceil_div(rows_a_step, rows)  # no optimizer step sees fewer rows than before
        smaller = replace(train, batch_size=rows, grad_accumulation_steps=steps)
        remark = f"with grad_accumulation_steps={steps}: same rows a step, somewhat slower"
        changed = replace(setup, train=smaller)
        yield self._change("batch_size", train.batch_size, rows, changed, "none", remark)

    def _checkpoints(self) -> Iterator[Change]:
        setup = self.est.setup
        if not setup.train.grad_checkpoint:
            changed = setup.with_value("grad_checkpoint", True)
            remark = "same numbers; every block is computed twice"
            yield self._change("grad_checkpoint", False, True, changed, "none", remark)

    def _smaller_rank(self) -> Iterator[Change]:
        remark = "a smaller adapter, alpha as it was"
        yield from self._largest("rank", self.est.setup.adapter.rank, "small", remark)

    def _fewer_blocks(self) -> Iterator[Change]:
        count = self.est.setup.adapter.num_layers
        now = count if count > 0 else self.est.blocks  # −1 adapts all blocks
        yield from self._largest("num_layers", now, "some", "the first blocks stay as they are")

    def _shorter_rows(self) -> Iterator[Change]:
        now = self.est.setup.train.max_seq_length
        yield from self._largest("max_seq_length", now, "some", "longer rows are cut")

    def _fewer_bits(self) -> Iterator[Change]:
        """Yield the most bits that fit: of the scheme in use, or affine if there is none yet."""
        plan = self.est.setup.plan
        if plan is None and self.est.spec.storage:
            return  # weights that came quantized are not quantized again
        default = plan.default if plan else QuantConfig("affine", 8)
        now = default.bits if plan else 16
        fewer = [bits for bits in default.scheme.bits if bits < now]
        for bits in sorted(fewer, reverse=True):
            config = QuantConfig(default.mode, bits, default.group_size)
            setup = replace(self.est.setup, plan=QuantPlan(config))
            if self.at(setup).total_nbytes <= self.machine.free_nbytes:
                cost = _BITS_COST.get(bits, "some")
                yield self._change("bits", now, bits, setup, cost, f"weights as {setup.label}")
                return

    def _largest(self, name: str, now: int, quality: str, remark: str) -> Iterator[Change]:
        """Yield the change of one setting to the largest value that fits, if that is smaller."""
        value = self._solved(name, now)
        if value is not None:
            changed = self.est.setup.with_value(name, value)
            yield self._change(name, now, value, changed, quality, remark)

    def _solved(self, name: str, now: int) -> int | None:
        """Return the largest value that fits if it is below the present one, else None."""
        try:
            value = solve(self.est, self.at, name, self.machine)
        except ConfigError:
            return None
        return value if value < now else None

    def _change(
        self, name: str, now: Any, then: Any, setup: Setup, quality: str, remark: str
    ) -> Change:
        return Change(
            name=name,
            now=now,
            then=then,
            total_nbytes=self.at(setup).total_nbytes,
            quality=quality,
            remark=remark,
            setup=setup,
        )
