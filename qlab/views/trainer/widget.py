"""The live trainer panel: two widgets, one for each direction. Sees states, never a model."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import anywidget
import traitlets as T

from qlab.core.panels.trainer import RunState
from qlab.views.shared.wire import Controls, source
from qlab.views.trainer import words
from qlab.views.trainer.curve import Curve

ESM = source(
    "shared/panel.js", "trainer/widget.js"
)  # text, not a Path: a Path keeps every instance alive
CSS = source("shared/panel.css", "trainer/widget.css")

_OPS = {
    "hello": {},
    "start": {},
    "pause": {},
    "resume": {},
    "stop": {},
    "learning_rate": {"value": (int, float)},
    "generate": {"prompt": str},
}
_PROMPTS = 12  # prompts whose answers are sent
_TEXT = 4000  # characters of an answer that are sent


class TrainerView(anywidget.AnyWidget):
    """Kernel → browser: the whole run, thinned where it is long.

    What seldom changes apart from what always does.
    """

    _esm = ESM
    _css = CSS
    curve = T.Bytes(b"").tag(sync=True)
    newest = T.Bytes(b"").tag(sync=True)
    marks = T.List().tag(sync=True)
    voices = T.List().tag(sync=True)
    state = T.Dict().tag(sync=True)
    controls = anywidget.WidgetTrait().tag(sync=True)


def payload(state: RunState) -> dict[str, Any]:
    """Return a state as the traits of the view (without ``controls``)."""
    curve = Curve()
    curve.extend(state.history)
    return _traits(curve, state, facts(state, None))


def _traits(curve: Curve, state: RunState, known: dict[str, Any]) -> dict[str, Any]:
    settled, newest = curve.parts()
    return {
        "curve": settled,
        "newest": newest,
        "marks": list(curve.marks),
        "voices": voices_of(state),
        "state": known,
    }


def facts(state: RunState, ack: int | None) -> dict[str, Any]:
    """Return everything but curve and voices: what the run is and where it stands."""
    report = state.report
    icon, word = words.status_words(state)
    return {
        "name": report.name,
        "setup": [part for part in (report.model, report.storage, report.adapter) if part],
        "status": report.status,
        "icon": icon,
        "word": word,
        "headline": words.headline(state),
        "steps": report.steps,
        "iters": report.iters,
        "allowed": list(words.allowed(state)),
        "ended": report.status in words.ENDED,
        "rate": _number(state.learning_rate),
        "best": [report.best_step, report.best_val_loss]
        if math.isfinite(report.best_val_loss)
        else None,
        "predicted": report.predicted_nbytes,
        "limit": state.limit_nbytes,
        "active": state.active_nbytes,
        "said": len(state.voices),
        "data": state.data,
        "error": state.error,
        "code": state.code,
        "notes": list(report.notes),
        "summary": [list(line) for line in words.summary(report)],
        "ack": ack or 0,
    }


def _number(value: float) -> float | None:
    """JSON knows no NaN."""
    return float(value) if math.isfinite(value) else None


def voices_of(state: RunState) -> list[Any]:
    """Return ``[prompt, [step, text] first, [step, text] last]`` of each prompt, the one asked last
    at the end.
    """
    by_prompt: dict[str, list[Any]] = {}
    for voice in state.voices:
        said = by_prompt.pop(voice.prompt, [])  # moves it to the end
        by_prompt[voice.prompt] = [*said[:1], [voice.step, voice.text[:_TEXT]]]
    return [[prompt, said[0], said[-1]] for prompt, said in list(by_prompt.items())[-_PROMPTS:]]


class TrainerPanel:
    """One panel: shows states and passes on what the user wants.

    Args:
        state: shown first.
        on_intent: called on a widget thread with a checked intent: ``hello``, ``start``, ``pause``,
            ``resume``, ``stop``, ``learning_rate`` (``value``) or ``generate`` (``prompt``); what
            it raises is shown in the panel.
    """

    def __init__(self, state: RunState, on_intent: Callable[[dict[str, Any]], None]) -> None:
        self._state = state
        self._on_intent = on_intent
        # newest intent heard; why it was refused, shown until the next one
        self._ack = 0
        self._complaint = ""
        self._lock = threading.RLock()
        self._curve = Curve()
        self._curve.extend(state.history)
        self._controls = Controls()
        self.widget = TrainerView(
            controls=self._controls, **_traits(self._curve, state, facts(state, None))
        )
        self._controls.listen(_OPS, self._heard, self._refused)

    def show(self, state: RunState, ack: int | None = None) -> None:
        """Send what has changed, in one message.

        After the run everything, so that a view can never stay behind.

        Args:
            state: the run now.
            ack: number of the newest intent that the state answers.
        """
        # hold_sync loses what another thread sets while it flushes
        with self._lock:
            ended = (
                self._state.report.status not in words.ENDED and state.report.status in words.ENDED
            )
            self._state = state
            self._ack = max(self._ack, ack or 0)
            self._curve.extend(state.history)
            traits = _traits(self._curve, state, self._facts())
            with self.widget.hold_sync():
                for name, value in traits.items():
                    if getattr(self.widget, name) != value:
                        setattr(self.widget, name, value)
            if ended:
                self.widget.send_state(list(traits))

    def close(self) -> None:
        """Take the panel off the page."""
        self.widget.close()
        self._controls.close()

    def _heard(self, intent: dict[str, Any]) -> None:
        self._complaint = ""
        self._on_intent(intent)

    def _refused(self, seq: int | None, error: str) -> None:
        with self._lock:
            self._complaint = error
            self._ack = max(self._ack, seq or 0)
            self.widget.state = self._facts()

    def _facts(self) -> dict[str, Any]:
        made = facts(self._state, self._ack)
        return {**made, "error": self._complaint or made["error"]}
