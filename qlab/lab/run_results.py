"""``RunResults``: what can be read of a training run, at any time; ``Trainer`` inherits it.

Everything here asks the run and changes nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlab.core.config.train import TrainConfig
from qlab.core.memory.estimate import MemoryEstimate
from qlab.core.train.data_report import DataReport
from qlab.core.train.events import StepEvent
from qlab.core.train.report import RunReport
from qlab.core.train.rows import Rows
from qlab.deprecated import deprecated_name
from qlab.engine.data.batches import Feed
from qlab.engine.data.preview import report as data_report
from qlab.lab.adapter import Adapter
from qlab.lab.training_run import TrainingRun


class RunResults:
    """State, figures and memory of a run.

    Attributes:
        adapter: the adapter that is trained.
        feed: batches to train on, by number.
        held_out: rows for validation, or None.
    """

    adapter: Adapter
    feed: Feed
    held_out: Rows | None
    _training: TrainingRun

    @property
    def path(self) -> Path:
        """Folder of the run."""
        return self._training.folder

    @property
    def config(self) -> TrainConfig:
        """Config of the run; its repr pastes back."""
        return self._training.session.config

    @property
    def status(self) -> str:
        """``idle``, ``running``, ``paused``, ``stopped``, ``done`` or ``failed``."""
        return self._training.session.status

    @property
    def held(self) -> Rows | None:
        """Deprecated: the same as ``held_out``."""
        deprecated_name("Trainer.held", "held_out")
        return self.held_out

    @property
    def data(self) -> DataReport:
        """What is trained on, token by token: targets, masked, cut, padding, duplicates."""
        return data_report(self.feed, self.adapter.model.tokenizer, self.held_out)

    @property
    def events(self) -> tuple[StepEvent, ...]:
        """Every event so far."""
        return self._training.session.events

    @property
    def history(self) -> Any:
        """Every step as a data frame."""
        import pandas as pd

        return pd.DataFrame([event.record() for event in self.events])

    @property
    def report(self) -> RunReport:
        """The run so far."""
        return self._training.report

    @property
    def estimate(self) -> MemoryEstimate:
        """Memory of a step with the largest batch, by formula or as ``probe`` measured it."""
        return self._training.memory.estimate(self.config)

    def probe(self) -> MemoryEstimate:
        """Run one step with the largest batch and return the memory that it took; blocks.

        Neither adapter nor run are changed by it.

        Raises:
            BusyError: the run is under way.
        """
        self._training.check_not_active()
        return self._training.memory.measure(self.config)
