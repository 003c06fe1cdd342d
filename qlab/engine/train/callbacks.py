"""The callbacks of a run: called with every event, and never able to end the run.

``Session`` calls them on the MLX thread. What a callback may have besides ``__call__``: a method
``finish(report)``, and an attribute ``error`` that says what went wrong (see ``reporters``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from qlab.core.train.events import StepEvent
from qlab.core.train.report import RunReport
from qlab.errors import ConfigError

Callback = Callable[[StepEvent], Any]


class Callbacks:
    """Users' functions that are called with every ``StepEvent``.

    Args:
        callbacks: one function, or several.

    Raises:
        ConfigError: one of them cannot be called.
    """

    def __init__(self, callbacks: Callback | Iterable[Callback]) -> None:
        if isinstance(callbacks, Iterable) and not callable(callbacks):
            self._callbacks: list[Any] = list(callbacks)
        else:
            self._callbacks = [callbacks]
        for callback in self._callbacks:
            if not callable(callback):
                raise ConfigError(
                    f"callbacks={callback!r} is not legal; give functions that take a StepEvent."
                )

    def call(self, event: StepEvent) -> tuple[str, ...]:
        """Call all with an event; one that fails is not called again.

        Returns:
            Notes on those that failed.
        """
        notes = []
        for callback in list(self._callbacks):
            try:
                callback(event)
            except Exception as error:  # a user's error must not end the run
                self._callbacks.remove(callback)
                notes.append(
                    f"a callback failed at step {event.step} and is called no more: {error!r}"
                )
        return tuple(notes)

    def finish(self, report: RunReport) -> tuple[str, ...]:
        """Hand the report of the ended run to those that have a ``finish``.

        Returns:
            Notes on those that failed, now or before.
        """
        notes = []
        for callback in self._callbacks:
            try:
                finish = getattr(callback, "finish", None)
                if finish:
                    finish(report)
                error = getattr(callback, "error", None)
                if error:
                    notes.append(str(error))
            except Exception as error:  # as above
                notes.append(f"a callback failed at the end: {error!r}")
        return tuple(notes)
