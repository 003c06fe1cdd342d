"""Sends a run's events to an experiment tracker: callbacks for ``Trainer(callbacks=[…])``.

Trackers are optional packages, imported when a reporter is made, so that a missing one is reported
before the run.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from qlab.core.train.events import StepEvent
from qlab.core.train.report import RunReport
from qlab.errors import ConfigError

_INSTALL = {"wandb": "pip install wandb", "trackio": "pip install trackio"}


class Reporter:
    """Logs every event of a training run to a run of a tracker.

    The tracker's run begins here and not with the first event: what it prints then belongs to this
    cell, and what it lacks (a login, a network) is reported at once. Later failures never reach the
    training: nothing more is sent, and ``error`` says why.

    Example:
        >>> reporter = qlab.reporters.trackio("house", name="rank 8")
        >>> qlab.Trainer(a, rows, callbacks=[reporter]).run()

    Args:
        run: object that has ``log(values, step=…)`` and ``finish()``, as the runs of W&B and
            trackio have; it is used from the MLX thread.

    Attributes:
        error: what the tracker failed with, in words, or an empty string.
    """

    def __init__(self, run: Any) -> None:
        self._run = run
        self._ended = False
        self.error = ""

    def __call__(self, event: StepEvent) -> None:
        """Log an event; what was not measured, or is no number, is left out. Never raises."""
        if not self._ended and not self.error:
            values = {key: value for key, value in event.record().items() if _is_loggable(value)}
            step = values.pop("step")
            self._try(lambda: self._run.log(values, step=step))

    def finish(self, report: RunReport | None = None) -> None:
        """End the tracker's run, once; whether the training was done, stopped or failed.

        Never raises.

        Args:
            report: of the training; its figures become the tracker's summary, where it has one.
        """
        if self._ended:
            return
        self._ended = True
        if report is not None and hasattr(self._run, "summary"):
            names = [field.name for field in fields(report) if field.name != "notes"]
            values = {name: getattr(report, name) for name in names}
            loggable = {name: value for name, value in values.items() if _is_loggable(value)}
            self._try(lambda: self._run.summary.update(loggable))
        self._try(self._run.finish)

    def _try(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except Exception as error:
            self.error = self.error or f"{type(error).__name__}: {error}"


def wandb(project: str, **settings: Any) -> Reporter:
    """Return a reporter to Weights & Biases.

    Args:
        project: where runs are gathered.
        settings: more for ``wandb.init``, such as ``name``, ``config`` or ``mode="offline"``.

    Raises:
        ConfigError: the package is missing. What the tracker itself raises is passed on.
    """
    return Reporter(_module("wandb").init(project=project, **settings))


def trackio(project: str, **settings: Any) -> Reporter:
    """Return a reporter to trackio, which keeps runs on this machine.

    Args:
        project: where runs are gathered.
        settings: more for ``trackio.init``, such as ``name``, ``config`` or ``space_id``.

    Raises:
        ConfigError: the package is missing. What the tracker itself raises is passed on.
    """
    return Reporter(_module("trackio").init(project=project, **settings))


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"The package {name} is missing ({error}): {_INSTALL[name]}. The run needs no reporter."
        ) from None


def _is_loggable(value: Any) -> bool:
    """Whether a value says something: it is not None, empty, NaN or infinite."""
    if isinstance(value, float):
        return math.isfinite(value)
    return value is not None and value != ""
