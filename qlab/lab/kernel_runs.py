"""The runs of this kernel: which base is being trained on, and what became of every run.

``Trainer`` reports here when it starts and ends; ``qlab.runs()`` shows them side by side.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary, ref

from qlab.core.train.events import StepEvent
from qlab.core.train.report import RunReport
from qlab.errors import BusyError
from qlab.lab.model import Model
from qlab.views.cards.runs import Runs


class Run(Protocol):
    """A run, under way or ended."""

    @property
    def report(self) -> RunReport:
        """The run so far."""
        ...

    @property
    def events(self) -> tuple[StepEvent, ...]:
        """Every event so far."""
        ...


class EndedRun(NamedTuple):
    """What is remembered of a run that has ended: nothing that holds a model in memory."""

    report: RunReport
    events: tuple[StepEvent, ...]


_names_by_base: WeakKeyDictionary[Model, str] = WeakKeyDictionary()  # bases that are trained on
_runs_by_folder: dict[Path, EndedRun | ref[Run]] = {}


def claim_base(base: Model, name: str) -> None:
    """Reserve a base for a run.

    Raises:
        BusyError: another run trains on it.
    """
    if base in _names_by_base:
        raise BusyError(
            f"The run {_names_by_base[base]!r} trains on this model; stop it first, or load the "
            "model again."
        )
    _names_by_base[base] = name


def release_base(base: Model) -> None:
    """Let other runs train on a base."""
    _names_by_base.pop(base, None)


def remember_started(folder: Path, run: Run) -> None:
    """List a run that has started, without keeping it alive."""
    _runs_by_folder[folder] = ref(run)


def remember_ended(folder: Path, run: Run) -> None:
    """List a run as it ended."""
    _runs_by_folder[folder] = EndedRun(run.report, run.events)


def runs() -> Runs:
    """Return this kernel's runs side by side: a table, and their curves.

    Example:
        >>> qlab.runs()  # as the last line of a cell
        >>> qlab.runs().to_pandas()
    """
    known = [run() if isinstance(run, ref) else run for run in _runs_by_folder.values()]
    alive = [run for run in known if run is not None]
    return Runs(tuple(run.report for run in alive), tuple(run.events for run in alive))
