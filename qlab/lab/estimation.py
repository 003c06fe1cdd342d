"""``estimate``: what training will take, before anything is loaded. Wiring only.

Source → forecast → estimate → panel.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Generator, Iterable
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from qlab.core.config.legal import check_choice
from qlab.core.config.lora import LoRAConfig
from qlab.core.config.quant import QuantConfig, QuantPlan
from qlab.core.config.train import TrainConfig
from qlab.core.machine import Machine, budget, foreign
from qlab.core.memory.advice import Change
from qlab.core.memory.estimate import LEVELS, MemoryEstimate
from qlab.core.memory.setup import Setup
from qlab.core.memory.table import EstimateTable
from qlab.core.panels.estimate import BUDGETS, Choice, EstimateState
from qlab.core.progress import Progress
from qlab.engine.io.config_file import context, structure
from qlab.engine.memory.forecast import Forecast
from qlab.engine.memory.sweep import Sweep
from qlab.engine.step.blockwise import WINDOWS
from qlab.errors import ConfigError, QlabError, sealed
from qlab.lab.estimate_link import Link, config_of
from qlab.lab.model import Model
from qlab.runtime.atomic import write_page
from qlab.runtime.device import backend
from qlab.runtime.device import machine as _machine
from qlab.runtime.job import Latest, mlx_call
from qlab.views.estimate.static import html, page
from qlab.views.estimate.widget import EstimatePanel
from qlab.views.shared.wire import bundle

Source = Any  # a Model, a Quantizer, an Adapter, a config dict, a path or a hub id
_REST_S = 0.4  # sliders must rest so long before a whole step is traced
_AROUND_S = 20.0  # time spent at most on reading ahead
_KEPT = 64  # estimates remembered by a panel


def estimate(
    model: Source | Iterable[Source],
    quant: QuantConfig | QuantPlan | None | Iterable[QuantConfig | QuantPlan | None] = None,
    adapter: LoRAConfig | Iterable[LoRAConfig] | None = None,
    train: TrainConfig | Iterable[TrainConfig] | None = None,
    *,
    level: str = "formula",
    machine: Machine | str | float | None = None,
) -> Any:
    """Foresee the peak memory of training.

    Args:
        model: what ``qlab.load`` returned, a ``Quantizer`` or an ``Adapter`` (their plan and config
            count), contents of a config.json, the path of one or of its folder, or a hub id. No
            weights are read.
        quant: storage of the weights; None leaves them as the config, or the quantizer, has them.
        adapter: None is the adapter's own config, or ``LoRAConfig()``.
        train: None is ``TrainConfig()``.
        level: ``formula`` (at once), ``traced`` (seconds) or ``measured`` (runs one real step of a
            loaded model).
        machine: budget to judge by: a name such as ``"16 GB Mac"``, bytes, or None for this
            machine's free memory.

    Returns:
        A ``MemoryEstimate``; where any of the first four is a list, an ``EstimateTable`` of all
        combinations.

    Raises:
        LoadError: no such model, or of an unknown architecture.
        ConfigError: a setting is not legal, or does not fit the model.
        LayerNotFoundError: an override or an adapter's key names no layer.
    """
    check_choice("level", level, LEVELS)
    given = (model, quant, adapter, train)
    sources, storages, loras, runs = (
        list(x) if isinstance(x, (list, tuple)) else [x] for x in given
    )
    for name, values in (
        ("model", sources),
        ("quant", storages),
        ("adapter", loras),
        ("train", runs),
    ):
        if not values:
            raise ConfigError(f"{name}=[] is empty; give at least one.")
    rows = []
    for source in sources:
        forecast = _forecast(source)
        place = _place(forecast) if machine is None else budget(machine)
        for storage, lora, run in product(storages, loras, runs):
            lora_ = lora if lora is not None else config_of(source)
            setup = Setup(
                _plan(storage, source),
                _of(LoRAConfig, lora_, "adapter"),
                _of(TrainConfig, run, "train"),
            )
            link = Link(source, storage is None, lora is None)
            rows.append(_estimate(forecast, setup, place, level, link))
    return (
        EstimateTable(tuple(rows)) if any(isinstance(x, (list, tuple)) for x in given) else rows[0]
    )


def roomy(est: MemoryEstimate) -> MemoryEstimate:
    """Return an estimate with as many blocks in flight as pay here and fit the estimate's machine,
    if that is left open.
    """
    train = est.setup.train
    least, *more = WINDOWS[mlx_call(backend)]
    if train.window or not train.grad_checkpoint or not more:
        return est
    for window in (*reversed(more), least):
        found = est.again(est.setup.with_value("window", window))
        if found.high_nbytes <= est.machine.free_nbytes:
            break
    return found


def _estimate(
    forecast: Forecast, setup: Setup, place: Machine, level: str, link: Link
) -> MemoryEstimate:
    est = mlx_call(forecast.estimate, setup, place, level)
    return _asking(
        replace(est, notes=(*est.notes, *foreign(place, mlx_call(backend)))), forecast, link
    )


def _asking(est: MemoryEstimate, forecast: Forecast, link: Link) -> MemoryEstimate:
    """Return an estimate that can be asked for others, and has a panel."""

    def again(other: Setup) -> MemoryEstimate:
        return _estimate(forecast, other, est.machine, "formula", link)

    return replace(est, _again=again, _panel=lambda first: LiveEstimate(first, forecast, link))


def _forecast(source: Any) -> Forecast:
    """Return what is known of a source.

    A second question of the same source finds the formulas of the first.
    """
    model = getattr(source, "model", source)  # of a quantizer
    if isinstance(model, Model):
        module = model.module  # refuses one that was freed
        if model not in _LOADED:
            _LOADED[model] = mlx_call(Forecast, module, model.name, context(model.config), True)
        return _LOADED[model]
    if not isinstance(source, (dict, str, Path)):
        raise ConfigError(
            f"model={source!r} is not legal; give a model, a quantizer, a config, a path or a hub id."
        )
    return _opened(
        json.dumps(source, sort_keys=True, default=str)
        if isinstance(source, dict)
        else Path(source)
    )


_LOADED: WeakKeyDictionary[Model, Forecast] = WeakKeyDictionary()


@lru_cache(maxsize=8)
def _opened(source: str | Path) -> Forecast:
    def work() -> Forecast:
        module, name, config, notes = structure(
            json.loads(source) if isinstance(source, str) else source
        )
        return Forecast(module, name, context(config), False, notes)

    return mlx_call(work)


def _place(forecast: Forecast) -> Machine:
    """This machine.

    What a loaded model holds already counts as free, since the estimate counts it again.
    """
    here = mlx_call(_machine)
    return replace(
        here, free_nbytes=min(here.free_nbytes + forecast.held_nbytes, here.total_nbytes)
    )


def _plan(storage: Any, source: Any) -> QuantPlan | None:
    if storage is None:
        return getattr(source, "plan", None) if hasattr(source, "model") else None
    if isinstance(storage, QuantConfig):
        return QuantPlan(storage)
    if isinstance(storage, QuantPlan):
        return storage
    raise ConfigError(f"quant={storage!r} is not legal; give a QuantConfig, a QuantPlan or None.")


def _of(kind: Any, value: Any, name: str) -> Any:
    if value is None:
        return kind()
    if isinstance(value, kind):
        return value
    raise ConfigError(f"{name}={value!r} is not legal; give a {kind.__name__} or None.")


@sealed
class LiveEstimate:
    """An estimate whose settings move.

    By its sliders, or with the quantizer or adapter that it was made of.

    Args:
        first: where the sliders stand at first.
        forecast: of the model.
        link: what moves along.
    """

    def __init__(self, first: MemoryEstimate, forecast: Forecast, link: Link) -> None:
        self._forecast = forecast
        self._link = link
        self._setup = first.setup
        self._place = first.machine
        self._band = first.band if first.measured_peak is None else first.again(first.setup).band
        self._here = _place(forecast)
        self._backend = mlx_call(backend)
        named = [budget(name) for name in BUDGETS]
        self._budgets = list({m.label: m for m in (self._here, *named, first.machine)}.values())
        self._known = {first.setup: first}
        self._found: dict[tuple[Setup, Machine], tuple[Change, ...]] = {}
        self._sweep = mlx_call(Sweep, forecast, first.setup)
        mlx_call(self._sweep.read, first.setup)
        self._jobs = Latest(self._show)
        self._lock = threading.RLock()
        self._panel: EstimatePanel | None = None
        self._ack: int | None = None
        self._views = 0
        self._refused = ""

    @property
    def setup(self) -> Setup:
        """What the sliders show."""
        return self._setup

    @property
    def estimate(self) -> MemoryEstimate:
        """Of that setup and the chosen budget, at the best level known."""
        setup = self._setup
        if setup not in self._known:
            self._learn(mlx_call(self._forecast.estimate, setup, self._place))
        return _asking(
            replace(self._known[setup], machine=self._place, notes=self._notes),
            self._forecast,
            self._link,
        )

    @property
    def _notes(self) -> tuple[str, ...]:
        return (*self._forecast.notes, *foreign(self._place, self._backend))

    @property
    def widget(self) -> Any:
        """The live panel."""
        with self._lock:
            if self._panel is None:
                self._panel = EstimatePanel(self.state(), self._on_intent)
            return self._panel.widget

    def state(self) -> EstimateState:
        """What the panel shows now, as a value.

        Asks nothing of the MLX thread, which may be waiting to show.
        """
        setup = self._setup
        place = self._place
        known = self._known.get(self._setup)
        return EstimateState(
            spec=self._forecast.spec,
            setup=setup,
            estimate=replace(known, machine=place, notes=self._notes) if known else None,
            reach=self._sweep.reach,
            machine=place,
            budgets=tuple(self._budgets),
            band=self._band,
            context=self._forecast.context,
            changes=self._found.get((setup, place)),
            progress=self._jobs.progress,
            error=self._refused or self._jobs.error,
            loaded=self._forecast.held_nbytes > 0,
            linked=self._link.label,
            notes=self._notes,
        )

    def to_html(self, path: str) -> str:
        """Write one self-contained file in which the sliders still work, offline and without a
        kernel; return its path.
        """
        _ = self.estimate
        self._jobs.run(self._look_around)
        return write_page(path, page(self.state()))

    def close(self) -> None:
        """End the running job and the panel."""
        self._jobs.stop()
        if self._views:
            self._link.leave(self._on_source)
            self._views = 0
        if self._panel is not None:
            self._panel.close()
            self._panel = None

    def __repr__(self) -> str:
        return repr(self.estimate)

    def _repr_html_(self) -> str:
        return html(self.estimate)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None, **_: Any) -> Any:
        now = self.estimate
        return bundle(self.widget, repr(now), html(now))

    def _display_(self) -> Any:  # marimo
        return self.widget

    # --- within -----------------------------------------------------------------------------------

    def _learn(self, est: MemoryEstimate) -> None:
        known = self._known.get(est.setup)
        if known is None or LEVELS.index(est.level) >= LEVELS.index(known.level):
            self._known = {**dict(list(self._known.items())[-_KEPT:]), est.setup: est}

    def _work(self, measure: bool = False) -> Generator[Progress, None, None]:
        """Find all there is to know of the present setup, the quickest first, and then what lies
        around it.
        """
        setup = self._setup
        place = self._place
        yield Progress("reading this kind of step", 0, 1)
        self._learn(self._forecast.estimate(setup, place))
        self._sweep.read(setup)
        yield from self._changes(setup, place)
        if measure:
            yield Progress("running one step", 0, 1)
            self._learn(self._forecast.estimate(setup, _place(self._forecast), "measured"))
        elif self._known[setup].level == "formula":
            rested = time.monotonic() + _REST_S
            while time.monotonic() < rested:
                yield Progress("tracing", 0, 1)
                time.sleep(_REST_S / 20)
            self._learn(self._forecast.estimate(setup, place, "traced"))
        yield from self._changes(setup, place)
        yield from self._look_around()

    def _changes(self, setup: Setup, place: Machine) -> Generator[Progress, None, None]:
        yield Progress("looking for what fits", 0, 1)
        self._found = {(setup, place): self.estimate.changes(place)} if self._setup == setup else {}

    def _look_around(self) -> Generator[Progress, None, None]:
        """Read the kinds of step that the sliders may reach next."""
        around = list(self._sweep.nearby(self._setup))
        until = time.monotonic() + _AROUND_S
        for number, other in enumerate(around):
            yield Progress("reading nearby settings", number, len(around))
            if time.monotonic() > until:
                return
            with suppress(
                QlabError
            ):  # what this model cannot be is no news until a user asks for it
                self._sweep.read(other)

    def _show(self) -> None:
        with (
            self._lock
        ):  # called by cells, widgets and jobs: an older state must not overtake a newer one
            if self._panel is not None:
                self._panel.show(self.state(), self._ack)

    def _move(self, setup: Setup) -> None:
        self._link.push(setup)
        self._setup = setup
        self._jobs.start(self._work)

    def _on_source(self, change: Any) -> None:
        if (setup := self._link.pull(self._setup)) != self._setup:
            self._setup = setup
            self._jobs.start(self._work)
            self._show()

    def _on_intent(self, intent: dict[str, Any]) -> None:
        """Do what the browser asks; called on a widget thread, so work is only queued."""
        self._ack = intent["seq"]
        self._refused = ""
        try:
            getattr(self, f"_do_{intent['op']}")(intent)
        except (
            QlabError
        ) as error:  # kept until the next intent: a running job shows states all the time
            self._refused = str(error)
        self._show()

    def _do_hello(self, intent: dict[str, Any]) -> None:
        """A view has opened."""
        self._views += 1
        if self._views == 1:
            self._link.follow(self._on_source)
            self._setup = self._link.pull(self._setup)
            self._jobs.start(self._work)

    def _do_bye(self, intent: dict[str, Any]) -> None:
        self._views = max(self._views - 1, 0)
        if not self._views:
            self._link.leave(self._on_source)
            self._jobs.stop()

    def _do_set(self, intent: dict[str, Any]) -> None:
        wanted = intent["choice"]
        blocks = self.state().blocks
        offered = (change.setup for change in self._found.get((self._setup, self._place), ()))
        # a change that was offered may drop overrides, which have no control
        match = next((setup for setup in offered if Choice.of(setup, blocks) == wanted), None)
        self._move(match or wanted.setup(self._setup, blocks))

    def _do_budget(self, intent: dict[str, Any]) -> None:
        place = next((m for m in self._budgets if m.label == intent["name"]), None) or budget(
            intent["name"]
        )
        self._budgets = list({m.label: m for m in (*self._budgets, place)}.values())
        self._place = place
        self._jobs.start(self._work)

    def _do_measure(self, intent: dict[str, Any]) -> None:
        self._jobs.start(lambda: self._work(measure=True))

    def _do_cancel(self, intent: dict[str, Any]) -> None:
        self._jobs.stop()
