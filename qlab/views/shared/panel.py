"""What every live panel does: it shows states, and passes on what the user wants.

The four panels (quantizer, adapter, estimate, trainer) are final subclasses of ``LivePanel``. Each
says what its browser half receives; when something is sent, and under which lock, stands here.
The notebook object that owns a panel is a ``qlab.lab.panel.HasPanel``.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar

import anywidget

from qlab.views.shared.wire import Controls

State = TypeVar("State")
Intent = dict[str, Any]


class LivePanel(ABC, Generic[State]):
    """One panel on a page: two widgets, one for each direction.

    Args:
        state: shown first.
        on_intent: called on a widget thread with a checked intent; what it raises is shown in the
            panel until the next intent.

    Attributes:
        view: class of the widget that carries states to the browser. It has a trait ``state``
            (small and sent at every change), a trait ``controls``, and traits for what is large.
        operations: by name of an operation, the types of its values; see ``wire.checked``.
        widget: the view of this panel.
    """

    view: ClassVar[type[anywidget.AnyWidget]]
    operations: ClassVar[dict[str, dict[str, Any]]]

    def __init__(self, state: State, on_intent: Callable[[Intent], None]) -> None:
        self._state = state
        self._on_intent = on_intent
        self._ack = 0  # number of the newest intent that was answered
        self._complaint = ""  # why that intent was refused
        self._lock = threading.RLock()
        self._controls = Controls()
        self.widget: Any = self.view(controls=self._controls, **self.payload(state))
        self._controls.listen(self.operations, self._receive, self._refuse)

    # --- what a kind of panel says of itself ------------------------------------------------------

    @abstractmethod
    def payload(self, state: State) -> dict[str, Any]:
        """Return a state as all traits of the view, without ``controls``."""

    @abstractmethod
    def large(self, before: State, state: State, ended: bool) -> dict[str, Any]:
        """Return the large traits that may have changed; the unchanged ones are not sent.

        Args:
            before: the state shown until now.
            state: the state to show.
            ended: whether a job has just ended, so that nothing may be left out.
        """

    @abstractmethod
    def small(self, state: State, ack: int) -> dict[str, Any]:
        """Return the trait ``state``: what changes while a user works.

        It has the keys ``error`` (the last failure in words) and ``ack``.
        """

    def has_ended(self, before: Any, state: Any) -> bool:
        """Whether a job that ran in one state is over in the next."""
        return before.progress is not None and state.progress is None

    def outdates_complaint(self, before: State, state: State) -> bool:
        """Whether the new state makes the last refusal history; an intent always does."""
        return False

    def settled(self, intent: Intent) -> Intent:
        """Return an intent with its values turned into Python's; raise ValueError if unusable."""
        return intent

    # --- what all do alike ------------------------------------------------------------------------

    def show(self, state: State, ack: int | None = None) -> None:
        """Send what has changed, in one message.

        After a job everything is sent again, so that a view can never stay behind.

        Args:
            state: what to show.
            ack: number of the newest intent that the state answers.
        """
        # hold_sync loses what another thread sets while it flushes, hence the lock
        with self._lock:
            before = self._state
            ended = self.has_ended(before, state)
            if self.outdates_complaint(before, state):
                self._complaint = ""
            self._state = state
            self._ack = max(self._ack, ack or 0)
            large = self.large(before, state, ended)
            with self.widget.hold_sync():
                for name, value in large.items():
                    if getattr(self.widget, name) != value:
                        setattr(self.widget, name, value)
                self.widget.state = self._small()
            if ended:
                self.widget.send_state([*large, "state"])

    def close(self) -> None:
        """Take the panel off the page."""
        self.widget.close()
        self._controls.close()

    def _small(self) -> dict[str, Any]:
        small = self.small(self._state, self._ack)
        # a running job shows states all the time, which must not wipe a refusal away
        return {**small, "error": self._complaint or small["error"]}

    def _receive(self, intent: Intent) -> None:
        self._complaint = ""
        self._on_intent(self.settled(intent))

    def _refuse(self, seq: int | None, error: str) -> None:
        with self._lock:
            self._complaint = error
            self._ack = max(self._ack, seq or 0)
            self.widget.state = self._small()
