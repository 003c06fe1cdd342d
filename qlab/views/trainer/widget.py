"""The live trainer panel. It sees ``RunState`` values, never a model.

``Trainer`` makes a ``TrainerPanel`` for the last line of a cell. The browser half is
``curve.js`` (rows and pure functions), ``plot.js`` (the picture) and ``widget.js`` (the panel).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import anywidget
import traitlets as T

from qlab.core.panels.trainer import RunState
from qlab.views.shared.panel import LivePanel
from qlab.views.shared.wire import source
from qlab.views.trainer import words
from qlab.views.trainer.curve import Curve

ESM = source(  # text, not a Path: a Path keeps every instance alive
    "shared/panel.js",
    "trainer/curve.js",
    "trainer/plot.js",
    "trainer/widget.js",
)
CSS = source("shared/panel.css", "trainer/widget.css")

_MOST_PROMPTS = 12  # whose answers are sent
_LONGEST_ANSWER = 4000  # characters of an answer that are sent


class TrainerView(anywidget.AnyWidget):
    """Kernel → browser: the whole run, thinned where it is long.

    The newest rows of the curve are a trait of their own, since they change with every step.
    """

    _esm = ESM
    _css = CSS
    curve = T.Bytes(b"").tag(sync=True)
    newest = T.Bytes(b"").tag(sync=True)
    marks = T.List().tag(sync=True)
    generations = T.List().tag(sync=True)
    state = T.Dict().tag(sync=True)
    controls = anywidget.WidgetTrait().tag(sync=True)


class TrainerPanel(LivePanel[RunState]):
    """One trainer panel: shows states and passes on what the user wants.

    Args:
        state: shown first.
        on_intent: called on a widget thread with a checked intent: ``hello``, ``start``, ``pause``,
            ``resume``, ``stop``, ``learning_rate`` (``value``) or ``generate`` (``prompt``); what
            it raises is shown in the panel.
    """

    view = TrainerView
    operations = {
        "hello": {},
        "start": {},
        "pause": {},
        "resume": {},
        "stop": {},
        "learning_rate": {"value": (int, float)},
        "generate": {"prompt": str},
    }

    def __init__(self, state: RunState, on_intent: Callable[[dict[str, Any]], None]) -> None:
        self._curve = Curve()
        super().__init__(state, on_intent)

    def payload(self, state: RunState) -> dict[str, Any]:
        """Return a state as all traits of the view, without ``controls``."""
        return {**_run_traits(self._curve, state), "state": small_state(state)}

    def large(self, before: RunState, state: RunState, ended: bool) -> dict[str, Any]:
        """Return curve, marks and generations; those that have not changed are not sent."""
        return _run_traits(self._curve, state)

    def small(self, state: RunState, ack: int) -> dict[str, Any]:
        """Return the trait ``state``."""
        return small_state(state, ack)

    def has_ended(self, before: RunState, state: RunState) -> bool:
        """Whether the run was under way and is over."""
        return before.report.status not in words.ENDED and state.report.status in words.ENDED


def payload(state: RunState) -> dict[str, Any]:
    """Return a state as the traits of the view, without ``controls``, for a page."""
    return {**_run_traits(Curve(), state), "state": small_state(state)}


def _run_traits(curve: Curve, state: RunState) -> dict[str, Any]:
    curve.extend(state.history)
    settled, newest = curve.parts()
    return {
        "curve": settled,
        "newest": newest,
        "marks": list(curve.marks),
        "generations": generations_of(state),
    }


def small_state(state: RunState, ack: int = 0) -> dict[str, Any]:
    """Return all but curve, marks and generations: what the run is and where it stands."""
    report = state.report
    icon, word = words.status_words(state)
    best = None
    if math.isfinite(report.best_val_loss):
        best = [report.best_step, report.best_val_loss]
    return {
        "name": report.name,
        "setup": words.setup(report),
        "status": report.status,
        "icon": icon,
        "word": word,
        "headline": words.headline(state),
        "steps": report.steps,
        "iters": report.iters,
        "allowed": list(words.allowed(state)),
        "ended": report.status in words.ENDED,
        "rate": _json_number(state.learning_rate),
        "best": best,
        "predicted": report.predicted_nbytes,
        "limit": state.limit_nbytes,
        "active": state.active_nbytes,
        "answers": len(state.generations),
        "data": state.data,
        "error": state.error,
        "code": state.code,
        "notes": list(report.notes),
        "summary": [list(line) for line in words.summary(report)],
        "ack": ack,
    }


def _json_number(value: float) -> float | None:
    """Return a number, or None where JSON has none (NaN, infinity)."""
    return float(value) if math.isfinite(value) else None


def generations_of(state: RunState) -> list[Any]:
    """Return ``[prompt, [step, text] first, [step, text] last]`` of each prompt.

    The prompt that was asked last comes last.
    """
    by_prompt: dict[str, list[Any]] = {}
    for item in state.generations:
        earlier = by_prompt.pop(item.prompt, [])  # taken out and put at the end
        newest = [item.step, item.text[:_LONGEST_ANSWER]]
        by_prompt[item.prompt] = [*earlier[:1], newest]
    shown = list(by_prompt.items())[-_MOST_PROMPTS:]
    return [[prompt, answers[0], answers[-1]] for prompt, answers in shown]
