"""``MemoryEstimate``: what a training step needs, part by part, as a value.

The forecast of the engine makes it; ``qlab.lab.estimate.Estimate`` adds what needs the model, such
as the inverse and the panel. Views draw it.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlab.core.config.code import setup_code
from qlab.core.config.spec import ModelSpec
from qlab.core.display import Displayed, size_text
from qlab.core.graph.parts import INPUTS, PARTS
from qlab.core.machine import Machine, Verdict, budget, verdict
from qlab.core.memory.setup import Setup
from qlab.deprecated import deprecated_name

LEVELS = ("formula", "traced", "measured")  # each nearer to a real step than the one before


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate(Displayed):
    """Peak memory of a training step, by part.

    Example:
        >>> est = qlab.estimate("demo", qlab.QuantConfig(bits=4))
        >>> est.total_nbytes, est.parts["weights"]
        >>> est.fits("16 GB Mac"), est.verdict("16 GB Mac").reason

    Attributes:
        spec: the model's layers.
        setup: storage of the weights, adapter and run.
        parts: bytes at the peak by part, in the order of ``core.graph.parts.PARTS``; they sum to
            ``total_nbytes``.
        level: ``formula``, ``traced`` or ``measured``.
        moment: when the peak comes: ``forward``, ``loss``, ``backward`` or ``update``.
        band: lower and upper end of the uncertainty, as multiples of what is not exact (all but
            weights, adapter and optimizer).
        machine: the budget that ``fits`` and ``verdict`` compare with by default.
        context: tokens that the model was made for, or None if its config does not say.
        measured_peak: bytes of the real peak, where a step was run; then it is the total too.
        notes: sentences about what this estimate assumes.
    """

    spec: ModelSpec
    setup: Setup
    parts: dict[str, int]
    level: str
    moment: str
    band: tuple[float, float]
    machine: Machine
    context: int | None = None
    measured_peak: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def total_nbytes(self) -> int:
        """Expected peak in bytes: the sum of the parts."""
        return sum(self.parts.values())

    @property
    def exact_nbytes(self) -> int:
        """Bytes of weights, adapter and optimizer, which are known exactly."""
        return sum(self.parts[name] for name in INPUTS)

    @property
    def expected_nbytes(self) -> int:
        """Deprecated: the same as ``total_nbytes``."""
        deprecated_name("MemoryEstimate.expected_nbytes", "total_nbytes")
        return self.total_nbytes

    @property
    def low_nbytes(self) -> int:
        """Lower end of the band, in bytes."""
        return self._end(self.band[0])

    @property
    def high_nbytes(self) -> int:
        """Upper end of the band, in bytes."""
        return self._end(self.band[1])

    def _end(self, factor: float) -> int:
        estimated = self.total_nbytes - self.exact_nbytes
        return round(self.exact_nbytes + factor * estimated)

    @property
    def largest(self) -> str:
        """The largest part, in words."""
        name = max(self.parts, key=lambda part: self.parts[part])
        return PARTS[name]

    @property
    def blocks(self) -> int:
        """Number of the model's transformer blocks."""
        return len(self.spec.blocks)

    @property
    def code(self) -> str:
        """The Python that makes this estimate of a model called ``model``."""
        return setup_code(self.setup.plan, self.setup.adapter, self.setup.train)

    def fits(self, nbytes: float | str | Machine | None = None) -> bool:
        """Return whether the expected peak is within a budget.

        Args:
            nbytes: bytes, a machine, or a name such as ``"16 GB Mac"``; None is the estimate's own
                machine.

        Raises:
            ConfigError: the budget is none of these.
        """
        return bool(self.verdict(nbytes))

    def verdict(self, nbytes: float | str | Machine | None = None) -> Verdict:
        """Return fits, tight or does not fit, with the margin and the reason.

        Args:
            nbytes: as in ``fits``.

        Raises:
            ConfigError: the budget is not legal.
        """
        machine = self.machine if nbytes is None else budget(nbytes)
        return verdict(self.total_nbytes, self.high_nbytes, self.largest, machine)

    def __repr__(self) -> str:
        width = max(len(name) for name in self.parts)
        rows = [
            f"  {name:<{width}}  {size_text(nbytes):>10}  {PARTS[name]}"
            for name, nbytes in self.parts.items()
        ]
        verdict_line = f"{self.machine.label}: {self.verdict()}"
        return "\n".join([self._headline(), *rows, verdict_line, *self.notes])

    def _headline(self) -> str:
        train = self.setup.train
        adapter = self.setup.adapter
        tokens = f"{train.batch_size} × {train.max_seq_length} tokens"
        asked = f"{self.spec.name}, {self.setup.label}, {adapter.kind} r{adapter.rank}, {tokens}"
        size = f"{size_text(self.total_nbytes)} {self.level}"
        band = f"{size_text(self.low_nbytes)} … {size_text(self.high_nbytes)}"
        return f"MemoryEstimate({asked}: {size}, {band}, peak in {self.moment})"
