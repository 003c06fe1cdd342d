"""What a live estimate knows of the settings it has shown, and the job that finds out more."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import suppress

from qlab.core.machine import Machine
from qlab.core.memory.changes import Change, changes
from qlab.core.memory.estimate import LEVELS, MemoryEstimate
from qlab.core.memory.setup import Setup
from qlab.core.progress import Progress
from qlab.engine.memory.forecast import Forecast
from qlab.engine.memory.sweep import Sweep
from qlab.errors import QlabError
from qlab.lab.estimate_source import this_machine
from qlab.runtime.job import mlx_call

_REST_S = 0.4  # sliders must rest so long before a whole step is traced
_AROUND_S = 20.0  # time spent at most on reading nearby settings
_MOST_ESTIMATES = 64  # remembered

Events = Generator[Progress, None, None]


def _rank(est: MemoryEstimate) -> int:
    return LEVELS.index(est.level)


class Findings:
    """Estimates at the best level known, changes that would make one fit, and the sliders' reach.

    Args:
        forecast: of the model.
        first: the estimate that the panel opens with.

    Attributes:
        sweep: what the sliders reach.
    """

    def __init__(self, forecast: Forecast, first: MemoryEstimate) -> None:
        self._forecast = forecast
        self._estimates = {first.setup: first}
        self._changes: dict[tuple[Setup, Machine], tuple[Change, ...]] = {}
        self.sweep: Sweep = mlx_call(Sweep, forecast, first.setup)
        mlx_call(self.sweep.read, first.setup)

    def estimate_of(self, setup: Setup) -> MemoryEstimate | None:
        """Return what is known of a setup, or None."""
        return self._estimates.get(setup)

    def changes_of(self, setup: Setup, machine: Machine) -> tuple[Change, ...] | None:
        """Return the changes that make a setup fit a machine, or None if not looked for yet."""
        return self._changes.get((setup, machine))

    def learn(self, est: MemoryEstimate) -> None:
        """Remember an estimate, unless a better level of its setup is known."""
        known = self._estimates.get(est.setup)
        if known is not None and _rank(est) < _rank(known):
            return
        # a new dict, since other threads read the present one
        estimates = list(self._estimates.items())
        recent = dict(estimates[-_MOST_ESTIMATES:])
        recent[est.setup] = est
        self._estimates = recent

    # --- jobs, on the MLX thread ------------------------------------------------------------------

    def improve(self, setup: Setup, machine: Machine, measure: bool = False) -> Events:
        """Find out all there is to know of a setup, the quickest first, then of nearby ones.

        Args:
            setup: what the sliders show.
            machine: the budget chosen.
            measure: whether to run one real step.
        """
        yield Progress("reading this kind of step", 0, 1)
        by_formula = self._forecast.estimate(setup, machine)
        self.learn(by_formula)
        self.sweep.read(setup)
        yield from self._find_changes(setup, machine)
        if measure:
            yield Progress("running one step", 0, 1)
            here = this_machine(self._forecast)
            measured = self._forecast.estimate(setup, here, "measured")
            self.learn(measured)
        elif self._estimates[setup].level == "formula":
            yield from self._trace(setup, machine)
        yield from self._find_changes(setup, machine)
        yield from self.look_around(setup)

    def _trace(self, setup: Setup, machine: Machine) -> Events:
        rested = time.monotonic() + _REST_S
        pause = _REST_S / 20
        while time.monotonic() < rested:
            yield Progress("tracing", 0, 1)  # here a newer job may take this one's place
            time.sleep(pause)
        traced = self._forecast.estimate(setup, machine, "traced")
        self.learn(traced)

    def _find_changes(self, setup: Setup, machine: Machine) -> Events:
        yield Progress("looking for what fits", 0, 1)

        def at(other: Setup) -> MemoryEstimate:
            return self._forecast.estimate(other, machine)

        est = self._estimates[setup]
        fitting = changes(est, at, machine)
        self._changes = {(setup, machine): fitting}

    def look_around(self, setup: Setup) -> Events:
        """Read the kinds of step that the sliders may reach next."""
        nearby = list(self.sweep.nearby(setup))
        deadline = time.monotonic() + _AROUND_S
        count = len(nearby)
        for number, other in enumerate(nearby):
            yield Progress("reading nearby settings", number, count)
            if time.monotonic() > deadline:
                return
            # settings that are illegal for this model matter only once a user asks for them
            with suppress(QlabError):
                self.sweep.read(other)
