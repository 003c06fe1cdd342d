"""``MemoryEstimate``: what a training step will need, part by part; its inverse.

And what to change when it does not fit.

Knows neither how the parts were found nor how they are drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qlab.core.config.code import setup_code
from qlab.core.config.quant import QuantConfig
from qlab.core.config.spec import ModelSpec
from qlab.core.display import Displayed, size_text
from qlab.core.graph.parts import PARTS
from qlab.core.machine import Machine, Verdict, budget, verdict
from qlab.core.memory.setup import SOLVABLE, Setup
from qlab.errors import ConfigError, nearest

if TYPE_CHECKING:
    from qlab.core.memory.advice import Advice, Change


LEVELS = ("formula", "traced", "measured")
_MOST_ROWS = 4096  # rows of a batch that solve looks up to


@dataclass(frozen=True)
class MemoryEstimate(Displayed):
    """Peak memory of a training step.

    Attributes:
        spec: the model.
        setup: storage, adapter and run.
        parts: bytes at the peak by part, in the order of ``core.graph.parts.PARTS``; they sum to
            ``total_nbytes``.
        level: ``formula``, ``traced`` or ``measured``.
        moment: when the peak comes, such as ``loss``.
        band: lower and upper end as multiples of what is not exact (all but weights, adapter and
            optimizer).
        machine: the budget that ``fits`` takes unless told.
        context: tokens that the model was made for, or None if its config does not say.
        measured_peak: bytes of the real peak, where a step was run; then it is the total too.
        notes: what to know about this estimate.
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
    _again: Callable[[Setup], MemoryEstimate] | None = field(
        default=None, repr=False, compare=False
    )
    _panel: Callable[[MemoryEstimate], Any] | None = field(default=None, repr=False, compare=False)

    @property
    def total_nbytes(self) -> int:
        """Expected peak in bytes: the sum of the parts."""
        return sum(self.parts.values())

    @property
    def exact_nbytes(self) -> int:
        """Weights, adapter and optimizer: known to the byte."""
        return sum(self.parts[name] for name in ("weights", "adapter", "optimizer"))

    @property
    def expected_nbytes(self) -> int:
        """Same as ``total_nbytes``."""
        return self.total_nbytes

    @property
    def low_nbytes(self) -> int:
        """Lower end of the band."""
        return self._end(self.band[0])

    @property
    def high_nbytes(self) -> int:
        """Upper end of the band."""
        return self._end(self.band[1])

    def _end(self, factor: float) -> int:
        return round(self.exact_nbytes + factor * (self.total_nbytes - self.exact_nbytes))

    @property
    def largest(self) -> str:
        """The largest part, in words."""
        return PARTS[max(self.parts, key=lambda name: self.parts[name])]

    # --- questions --------------------------------------------------------------------------------

    def fits(self, nbytes: float | str | Machine | None = None) -> bool:
        """Whether the expected peak is within a budget.

        Args:
            nbytes: bytes, a machine, or a name such as ``"16 GB Mac"``; None is this machine's free
                memory.

        Raises:
            ConfigError: the budget is none of these.
        """
        return bool(self.verdict(nbytes))

    def verdict(self, nbytes: float | str | Machine | None = None) -> Verdict:
        """Return fits, tight or does not fit, with the margin and the reason."""
        place = self.machine if nbytes is None else budget(nbytes)
        return verdict(self.total_nbytes, self.high_nbytes, self.largest, place)

    def solve(self, name: str, budget_nbytes: float | str | Machine | None = None) -> int:
        """Return the largest value of a setting that fits, by the formula; all else stays as it is.

        Args:
            name: ``max_seq_length``, ``batch_size``, ``rank`` (alpha stays), ``num_layers`` or
                ``bits``.
            budget_nbytes: bytes, a machine, or a name; None is this machine's free memory.

        Raises:
            ConfigError: no such setting, or not even its smallest value fits; says what that needs.
        """
        if name not in SOLVABLE:
            raise ConfigError(
                f"solve has no {name!r}; choose one of {', '.join(SOLVABLE)}.{nearest(name, SOLVABLE)}"
            )
        place = self.machine if budget_nbytes is None else budget(budget_nbytes)
        legal = self._legal(name)
        need = self.again(self.setup.with_value(name, legal[0])).total_nbytes
        if need > place.free_nbytes:
            have = f"{size_text(place.free_nbytes)} are free"
            raise ConfigError(
                f"Not even {name}={legal[0]} fits: it needs {size_text(need)}, and {have} ({place.label})."
            )
        low = 0
        high = len(legal)
        while high - low > 1:
            middle = (low + high) // 2
            if (
                self.again(self.setup.with_value(name, legal[middle])).total_nbytes
                <= place.free_nbytes
            ):
                low = middle
            else:
                high = middle
        return legal[low]

    def changes(self, budget_nbytes: float | str | Machine | None = None) -> tuple[Change, ...]:
        """Return the single changes that would make it fit, the least cost to quality first.

        None if it fits already.
        """
        from qlab.core.memory.advice import changes

        return changes(self, self.machine if budget_nbytes is None else budget(budget_nbytes))

    def advise(self, budget_nbytes: float | str | Machine | None = None) -> Advice:
        """Say whether to train on 16-bit weights, on quantized ones, or a smaller model.

        With the reason and the settings.
        """
        from qlab.core.memory.advice import advise

        return advise(self, self.machine if budget_nbytes is None else budget(budget_nbytes))

    def _legal(self, name: str) -> Any:
        """Legal values of a setting, ascending."""
        if name == "bits":
            default = self.setup.plan.default if self.setup.plan else QuantConfig()
            return default.scheme.bits
        if name == "rank":
            return range(
                1, 1 + min(min(x.shape[-2:]) for x in self.setup.adapter.targets(self.spec))
            )
        if name == "num_layers":
            return range(1, 1 + self.blocks)
        return (
            range(2, 1 + (self.context or 2**17))
            if name == "max_seq_length"
            else range(1, 1 + _MOST_ROWS)
        )

    @property
    def blocks(self) -> int:
        """Number of the model's blocks."""
        return len(self.spec.blocks)

    def again(self, setup: Setup) -> MemoryEstimate:
        """Return the estimate of another setup of the same model, by the formula."""
        if self._again is None:
            raise ConfigError("This estimate was made without its model; call qlab.estimate again.")
        return self._again(setup)

    # --- display ----------------------------------------------------------------------------------

    @property
    def code(self) -> str:
        """The Python that makes this estimate of a model called ``model``."""
        return setup_code(self.setup.plan, self.setup.adapter, self.setup.train)

    @cached_property
    def panel(self) -> Any:
        """The live panel that starts from this estimate.

        ``panel.estimate`` is what its controls show now.

        Raises:
            ConfigError: the estimate was made without its model.
        """
        if self._panel is None:
            raise ConfigError("This estimate was made without its model; call qlab.estimate again.")
        return self._panel(self)

    def to_html(self, path: str) -> str:
        """Write one self-contained file in which the sliders still work, offline and without a
        kernel; return its path.
        """
        return self.panel.to_html(path)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None, **_: Any) -> Any:
        if self._panel is None:
            return {"text/plain": repr(self), "text/html": self._repr_html_()}
        return self.panel._repr_mimebundle_()

    def _display_(self) -> Any:  # marimo
        return self.panel.widget

    def __repr__(self) -> str:
        train = self.setup.train
        adapter = self.setup.adapter
        head = (
            f"MemoryEstimate({self.spec.name}, {self.setup.label}, {adapter.kind} r{adapter.rank}, "
            f"{train.batch_size} × {train.max_seq_length} tokens: {size_text(self.total_nbytes)} {self.level}, "
            f"{size_text(self.low_nbytes)} … {size_text(self.high_nbytes)}, peak in {self.moment})"
        )
        width = max(len(name) for name in self.parts)
        lines = [
            f"  {name:<{width}}  {size_text(n):>10}  {PARTS[name]}"
            for name, n in self.parts.items()
        ]
        return "\n".join([head, *lines, f"{self.machine.label}: {self.verdict()}", *self.notes])
