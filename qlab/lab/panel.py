"""What every notebook object with a live panel does: show itself, and do what the browser asks.

``Quantizer``, ``Adapter``, ``LiveEstimate`` and ``Trainer`` inherit ``HasPanel``. Each names its
views, says what is shown (``state``) and has one method ``_do_<operation>`` for each operation of
its panel. The browser's half of the plumbing is ``qlab.views.shared.panel.LivePanel``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from qlab.runtime.atomic import write_page
from qlab.views.shared.panel import LivePanel
from qlab.views.shared.wire import bundle


@dataclass(frozen=True, kw_only=True)
class PanelViews:
    """How one kind of object is drawn. All four are given a state.

    Attributes:
        panel: the live panel.
        text_line: returns one line of text.
        html: returns tables that any viewer shows.
        page: returns a self-contained file in which the panel works without a kernel.
    """

    panel: type[LivePanel]
    text_line: Callable[[Any], str]
    html: Callable[[Any], str]
    page: Callable[[Any], str]


class HasPanel:
    """Base of the objects that are a live panel as the last line of a cell.

    A subclass sets ``_views``, defines ``state`` and, for every operation ``x`` of its panel, a
    method ``_do_x(intent)``. It calls ``super().__init__()`` first, and ``_show()`` after each
    change that the panel should show.

    Example:
        >>> class Counter(HasPanel):
        ...     _views = PanelViews(panel=CounterPanel, text_line=str, html=str, page=str)
        ...
        ...     def state(self):
        ...         return CounterState(self.count)
        ...
        ...     def _do_add(self, intent):
        ...         self.count += intent["number"]
    """

    _views: ClassVar[PanelViews]

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)  # of the class that stands beside this one
        self._panel: LivePanel | None = None
        self._ack: int | None = None  # number of the last intent that was done
        self._shows_paused = 0  # how many ask that nothing is shown until they end
        self._lock = threading.RLock()

    # --- what a subclass says of itself -----------------------------------------------------------

    def state(self) -> Any:
        """What the panel shows now, as a value.

        Asks nothing of the MLX thread, which may be waiting to show.
        """
        raise NotImplementedError

    def _complete_state(self) -> Any:
        """What is shown without a panel; may wait for work that the panel would show later."""
        return self.state()

    def _panel_opened(self) -> None:
        """Called once a panel exists."""

    def _stop_work(self) -> None:
        """Called by ``close`` before the panel goes."""

    # --- how it is shown --------------------------------------------------------------------------

    @property
    def widget(self) -> Any:
        """The live panel, an ipywidget."""
        with self._lock:
            if self._panel is None:
                self._panel = self._views.panel(self.state(), self._on_intent)
                self._panel_opened()
            return self._panel.widget

    def to_html(self, path: str) -> str:
        """Write one self-contained file in which the sliders still work, without a kernel.

        Args:
            path: of the file.

        Returns:
            The path.
        """
        return write_page(path, self._views.page(self._complete_state()))

    def close(self) -> None:
        """End the running work and take the panel off the page."""
        self._stop_work()
        panel = self._panel
        self._panel = None
        if panel is not None:
            panel.close()

    def __repr__(self) -> str:
        return self._views.text_line(self._complete_state())

    def _repr_html_(self) -> str:
        return self._views.html(self._complete_state())

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None, **_: Any) -> Any:
        state = self._complete_state()
        return bundle(self.widget, self._views.text_line(state), self._views.html(state))

    def _display_(self) -> Any:  # marimo
        return self.widget

    def _show(self) -> None:
        """Show the present state in the panel, if there is one.

        Called by cells, widgets and jobs; under the lock no older state overtakes a newer one.
        """
        with self._lock:
            if self._panel is not None and not self._shows_paused:
                self._panel.show(self.state(), self._ack)

    @contextmanager
    def _show_once(self) -> Iterator[None]:
        """Show the state once at the end, however many changes are made within."""
        with self._lock:
            self._shows_paused += 1
        try:
            yield
        finally:
            with self._lock:
                self._shows_paused -= 1
            self._show()

    # --- what the browser asks --------------------------------------------------------------------

    def _on_intent(self, intent: dict[str, Any]) -> None:
        """Do what the browser asks; called on a widget thread, so long work is only queued."""
        do = getattr(self, f"_do_{intent['op']}")
        with self._show_once():
            do(intent)
            # only now: a state shown before this does not answer the intent
            self._ack = intent["seq"]

    def _do_hello(self, intent: dict[str, Any]) -> None:
        """A view has opened; the state that is shown next is the answer."""
