"""``Estimate``, which ``qlab.estimate`` returns, and ``LiveEstimate``, its panel."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from qlab.core.machine import Machine, backend_notes, budget
from qlab.core.memory import advice, changes, solve
from qlab.core.memory.estimate import MemoryEstimate
from qlab.core.memory.setup import Setup
from qlab.core.panels.estimate import BUDGETS, Choice, EstimateState
from qlab.deprecated import deprecated_name
from qlab.engine.memory.forecast import Forecast
from qlab.errors import reject_unknown_attributes
from qlab.lab.estimate_findings import Findings
from qlab.lab.estimate_link import TraitLink
from qlab.lab.estimate_source import this_machine
from qlab.lab.panel import HasPanel, PanelViews
from qlab.runtime.device import backend
from qlab.runtime.job import LatestJob, mlx_call
from qlab.views.estimate.static import page, state_html, text_line
from qlab.views.estimate.widget import EstimatePanel


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Estimate(MemoryEstimate):
    """Peak memory of a training step, of a model that can be asked for other settings.

    The last line of a cell shows its panel, in which the settings move.

    Example:
        >>> est = qlab.estimate("demo", qlab.QuantConfig(bits=4), machine="16 GB Mac")
        >>> est.total_nbytes, est.parts, est.fits("8 GB Mac")
        >>> est.solve("batch_size")                         # the largest batch that fits
        >>> est.at(est.setup.with_value("rank", 32))        # the same with another setting
        >>> est.advise("8 GB Mac")                          # which training to choose there

    Attributes:
        forecast: what is known of the model.
        link: the traits that move along with the panel's sliders.
    """

    forecast: Forecast
    link: TraitLink

    @classmethod
    def of(
        cls, forecast: Forecast, setup: Setup, machine: Machine, *, level: str, link: TraitLink
    ) -> Estimate:
        """Return the estimate of a setup; see ``qlab.estimate``."""
        value: MemoryEstimate = mlx_call(forecast.estimate, setup, machine, level)
        present_backend: str = mlx_call(backend)
        further_notes = backend_notes(machine, present_backend)
        value = replace(value, notes=(*value.notes, *further_notes))
        return cls.around(value, forecast, link)

    @classmethod
    def around(cls, value: MemoryEstimate, forecast: Forecast, link: TraitLink) -> Estimate:
        """Return a value that can be asked for other settings."""
        of_value = _fields_of(value)
        return cls(**of_value, forecast=forecast, link=link)

    @property
    def value(self) -> MemoryEstimate:
        """The estimate alone, which needs no model and can be pickled."""
        return MemoryEstimate(**_fields_of(self))

    def at(self, setup: Setup) -> Estimate:
        """Return the estimate of another setup of the same model, by the formula."""
        return Estimate.of(self.forecast, setup, self.machine, level="formula", link=self.link)

    def again(self, setup: Setup) -> Estimate:
        """Deprecated: the same as ``at``."""
        deprecated_name("Estimate.again(setup)", "at(setup)")
        return self.at(setup)

    def solve(self, name: str, budget_nbytes: float | str | Machine | None = None) -> int:
        """Return the largest value of a setting that fits, by the formula; all else stays as it is.

        Args:
            name: ``max_seq_length``, ``batch_size``, ``rank`` (alpha stays), ``num_layers`` or
                ``bits``.
            budget_nbytes: bytes, a machine, or a name; None is the estimate's own machine.

        Raises:
            ConfigError: no such setting, or not even its smallest value fits; says what that needs.
        """
        machine = self._budget(budget_nbytes)
        return solve.solve(self, self.at, name, machine)

    def changes(
        self, budget_nbytes: float | str | Machine | None = None
    ) -> tuple[changes.Change, ...]:
        """Return the single changes that would make it fit, the least cost to quality first.

        Args:
            budget_nbytes: as in ``solve``.

        Returns:
            Nothing if it fits already, or if no single change is enough.
        """
        machine = self._budget(budget_nbytes)
        return changes.changes(self, self.at, machine)

    def advise(self, budget_nbytes: float | str | Machine | None = None) -> advice.Advice:
        """Say whether to train on 16-bit weights, on quantized ones, or a smaller model.

        Args:
            budget_nbytes: as in ``solve``.

        Returns:
            The choice with its reason and settings.
        """
        machine = self._budget(budget_nbytes)
        return advice.advise(self, self.at, machine)

    def _budget(self, nbytes: float | str | Machine | None) -> Machine:
        if nbytes is None:
            return self.machine
        return budget(nbytes)

    @cached_property
    def panel(self) -> LiveEstimate:
        """The live panel that starts from this estimate.

        ``panel.estimate`` is what its controls show now.
        """
        return LiveEstimate(self)

    def to_html(self, path: str) -> str:
        """Write one self-contained file in which the sliders still work, without a kernel.

        Args:
            path: of the file.

        Returns:
            The path.
        """
        return self.panel.to_html(path)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None, **_: Any) -> Any:
        return self.panel._repr_mimebundle_()

    def _display_(self) -> Any:  # marimo
        return self.panel.widget

    def __reduce__(self) -> tuple[Any, ...]:
        # modules of a model do not pickle; the value does
        return _restored, (self.value,)

    def __deepcopy__(self, memo: Any) -> Estimate:
        return self  # frozen, and its forecast is shared by all estimates of a model


def _fields_of(value: MemoryEstimate) -> dict[str, Any]:
    names = [field.name for field in fields(MemoryEstimate)]
    return {name: getattr(value, name) for name in names}


def _restored(value: MemoryEstimate) -> MemoryEstimate:
    return value


@reject_unknown_attributes
class LiveEstimate(HasPanel):
    """An estimate whose settings move: by its sliders, or with the quantizer or adapter it is of.

    Args:
        first: where the sliders stand at first.
    """

    _views = PanelViews(panel=EstimatePanel, text_line=text_line, html=state_html, page=page)

    def __init__(self, first: Estimate) -> None:
        super().__init__()
        self._forecast = first.forecast
        self._link = first.link
        self._setup = first.setup
        self._machine = first.machine
        self._band = first.band
        if first.measured_peak is not None:
            by_formula = first.at(first.setup)
            self._band = by_formula.band
        self._backend: str = mlx_call(backend)
        here = this_machine(self._forecast)
        named = [budget(name) for name in BUDGETS]
        self._budgets = _by_label([here, *named, first.machine])
        self._findings = Findings(self._forecast, first.value)
        self._jobs = LatestJob(self._show)
        self._open_views = 0

    @property
    def setup(self) -> Setup:
        """What the sliders show."""
        return self._setup

    @property
    def estimate(self) -> Estimate:
        """The estimate of that setup and the chosen budget, at the best level known."""
        setup = self._setup
        value = self._findings.estimate_of(setup)
        if value is None:
            value = mlx_call(self._forecast.estimate, setup, self._machine)
            self._findings.learn(value)
        shown = self._shown(value)
        return Estimate.around(shown, self._forecast, self._link)

    def _shown(self, value: MemoryEstimate) -> MemoryEstimate:
        """Return an estimate compared with the chosen budget."""
        return replace(value, machine=self._machine, notes=self._notes)

    @property
    def _notes(self) -> tuple[str, ...]:
        of_backend = backend_notes(self._machine, self._backend)
        return (*self._forecast.notes, *of_backend)

    def state(self) -> EstimateState:
        """What the panel shows now, as a value.

        Asks nothing of the MLX thread, which may be waiting to show.
        """
        setup = self._setup
        machine = self._machine
        value = self._findings.estimate_of(setup)
        return EstimateState(
            spec=self._forecast.spec,
            setup=setup,
            estimate=self._shown(value) if value else None,
            reach=self._findings.sweep.reach,
            machine=machine,
            budgets=tuple(self._budgets),
            band=self._band,
            context=self._forecast.context,
            changes=self._findings.changes_of(setup, machine),
            progress=self._jobs.progress,
            error=self._jobs.error,
            loaded=self._forecast.loaded_nbytes > 0,
            linked=self._link.label,
            notes=self._notes,
        )

    def _complete_state(self) -> EstimateState:
        _ = self.estimate  # waits for it if it is not known yet
        return self.state()

    def to_html(self, path: str) -> str:
        """Write one self-contained file in which the sliders still work, without a kernel.

        Args:
            path: of the file.

        Returns:
            The path.
        """
        _ = self.estimate  # refuses what cannot be estimated before time is spent nearby
        self._jobs.run(lambda: self._findings.look_around(self._setup))
        return super().to_html(path)

    def _stop_work(self) -> None:
        self._jobs.stop()
        if self._open_views:
            self._link.unobserve(self._on_source)
            self._open_views = 0

    # --- what moves the settings ------------------------------------------------------------------

    def _improve(self, measure: bool = False) -> None:
        self._jobs.start(lambda: self._findings.improve(self._setup, self._machine, measure))

    def _on_source(self, change: Any) -> None:
        setup = self._link.read(self._setup)
        if setup != self._setup:
            self._setup = setup
            self._improve()
            self._show()

    def _do_hello(self, intent: dict[str, Any]) -> None:
        """A view has opened; while one is open, the sliders follow the source."""
        self._open_views += 1
        if self._open_views == 1:
            self._link.observe(self._on_source)
            self._setup = self._link.read(self._setup)
            self._improve()

    def _do_bye(self, intent: dict[str, Any]) -> None:
        self._open_views = max(self._open_views - 1, 0)
        if not self._open_views:
            self._link.unobserve(self._on_source)
            self._jobs.stop()

    def _do_set(self, intent: dict[str, Any]) -> None:
        setup = self._chosen(intent["choice"])
        self._link.write(setup)
        self._setup = setup
        self._improve()

    def _chosen(self, choice: Choice) -> Setup:
        """Return the setup of a choice; where it is an offered change, that change's setup.

        A change may drop overrides, which have no control.
        """
        blocks = self.state().blocks
        offered = self._findings.changes_of(self._setup, self._machine)
        for change in offered or ():
            of_change = Choice.of(change.setup, blocks)
            if of_change == choice:
                return change.setup
        return choice.setup(self._setup, blocks)

    def _do_budget(self, intent: dict[str, Any]) -> None:
        name = intent["name"]
        offered = {machine.label: machine for machine in self._budgets}
        machine = offered.get(name) or budget(name)
        self._budgets = _by_label([*self._budgets, machine])
        self._machine = machine
        self._improve()

    def _do_measure(self, intent: dict[str, Any]) -> None:
        self._improve(measure=True)

    def _do_cancel(self, intent: dict[str, Any]) -> None:
        self._jobs.stop()


def _by_label(machines: Iterable[Machine]) -> list[Machine]:
    """Return machines without repeated labels; the last one of a label counts."""
    by_label = {machine.label: machine for machine in machines}
    return list(by_label.values())
