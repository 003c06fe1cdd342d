"""How values are shown: sizes in words, and a seam through which views draw core values.

Core values hold no markup. A view registers itself for a kind of value; until one is loaded, a
notebook shows the value's ``repr``::

    @view_of(MemoryEstimate)                # in qlab/views
    def html(est: MemoryEstimate) -> str:
        return f"<b>{size_text(est.total_nbytes)}</b>"

Every object of ``qlab.lab`` loads the views, and so does ``import qlab.views``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Kind = TypeVar("Kind")

_VIEWS: dict[type, Callable[[Any], str]] = {}
_FIGURES: dict[type, Callable[[Any], Any]] = {}
PLOTLY = "application/vnd.plotly.v1+json"


class Displayed:
    """Mixin of a core value that shows itself in a notebook by the view registered for its kind."""

    __slots__ = ()

    def _repr_html_(self) -> str | None:
        view = view_for(type(self))
        return None if view is None else view(self)  # None: IPython falls back to the repr


class Charted(Displayed):
    """Mixin of a core value that is also drawn as a plotly figure, by the function registered."""

    __slots__ = ()

    def figure(self) -> Any:
        """Return the chart as a static plotly figure."""
        return _FIGURES[type(self)](self)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        bundle: dict[str, Any] = {"text/plain": repr(self)}
        html = self._repr_html_()
        if html is not None:  # shown by viewers that cannot draw plotly
            bundle["text/html"] = html
        if type(self) in _FIGURES:
            bundle[PLOTLY] = self.figure().to_plotly_json()
        return bundle


def figure_of(kind: type[Kind]) -> Callable[[Callable[[Kind], Any]], Callable[[Kind], Any]]:
    """Register the decorated function, which returns a plotly figure, for a kind of ``Charted``."""

    def register(figure: Callable[[Kind], Any]) -> Callable[[Kind], Any]:
        _FIGURES[kind] = figure
        return figure

    return register


def view_of(kind: type[Kind]) -> Callable[[Callable[[Kind], str]], Callable[[Kind], str]]:
    """Register the decorated function, which returns HTML, as the view of a kind of value.

    Args:
        kind: a class that inherits ``Displayed``; its subclasses are shown by the same view.
    """

    def register(view: Callable[[Kind], str]) -> Callable[[Kind], str]:
        _VIEWS[kind] = view
        return view

    return register


def view_for(kind: type) -> Callable[[Any], str] | None:
    """Return the view of a kind of value, or of its nearest base class that has one."""
    for base in kind.__mro__:
        if base in _VIEWS:
            return _VIEWS[base]
    return None


def size_text(nbytes: float) -> str:
    """Write a size with its unit; GB = 1e9 bytes."""
    if abs(nbytes) >= 1e9:
        return f"{nbytes / 1e9:.2f} GB"
    return f"{nbytes / 1e6:.1f} MB"
