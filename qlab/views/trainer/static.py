"""The trainer panel without a kernel.

One line of text, a report that survives any viewer, and a self-contained page.

Sees states, never a model.
"""

from __future__ import annotations

import html as _html

import numpy as np

from qlab.core.display import wide
from qlab.core.panels.trainer import RunState
from qlab.core.train.events import StepEvent
from qlab.views.shared.chart import PALETTE, Line, image
from qlab.views.shared.wire import document
from qlab.views.trainer import words
from qlab.views.trainer.curve import LOSS, SMOOTH, VAL, Curve
from qlab.views.trainer.widget import CSS, ESM, payload, voices_of

_POINTS = 400  # of the picture: it is saved with the notebook


def text_line(state: RunState) -> str:
    """Return one line of numbers."""
    icon, word = words.status_words(state)
    report = state.report
    what = ", ".join(part for part in (report.model, report.storage, report.adapter) if part)
    error = f" · {state.error}" if state.error else ""
    return f"Trainer({what}: {icon} {word} · {words.headline(state)}{error})"


def html(state: RunState) -> str:
    """Return headline, curve and tables, which untrusted notebooks and code hosts show too."""
    report = state.report
    icon, word = words.status_words(state)
    what = " · ".join(
        _html.escape(part) for part in (report.model, report.storage, report.adapter) if part
    )
    error = f"<p><b>✕ {_html.escape(state.error)}</b></p>" if state.error else ""
    lines = words.summary(report)[3:]  # the first three are in the heading
    rows = "".join(
        f"<tr><th style='text-align:left'>{_html.escape(name)}</th><td>{_html.escape(text)}</td></tr>"
        for name, text in lines
    )
    notes = "".join(f"<li>{_html.escape(note)}</li>" for note in report.notes)
    return (
        f"<div><p><b>{what}</b> · {icon} {_html.escape(word)} · {_html.escape(words.headline(state))}</p>{error}"
        f"{picture(state.history)}<table><tbody>{rows}</tbody></table>{f'<ul>{notes}</ul>' if notes else ''}"
        f"{_voices(state)}{_marks(state)}<p>{_html.escape(state.data)}</p><pre>{_html.escape(state.code)}</pre></div>"
    )


def picture(history: tuple[StepEvent, ...]) -> str:
    """Return the loss curve as an ``<img>``; empty before the first step."""
    if not history:
        return ""
    curve = Curve(limit=_POINTS)
    curve.extend(history)
    rows = curve.rows()
    step = rows[:, 0]
    lines = (
        Line("", step, rows[:, LOSS], "#666", look="dots"),
        Line("training, smoothed", step, rows[:, SMOOTH], PALETTE[0]),
        Line("validation", step, rows[:, VAL], PALETTE[1], look="marked"),
    )
    if not np.isfinite(rows[:, [LOSS, VAL]]).any():
        return ""
    return image(lines, "step", "loss, nats per target token")


def _marks(state: RunState) -> str:
    marks = [(event.step, mark.text) for event in state.history for mark in event.marks]
    items = "".join(f"<li>step {step}: {_html.escape(text)}</li>" for step, text in marks)
    return (
        f"<details><summary>{len(marks)} events</summary><ul>{items}</ul></details>"
        if marks
        else ""
    )


def _voices(state: RunState) -> str:
    voices = voices_of(state)
    if not voices:
        return ""
    rows = "".join(
        f"<tr><td>{_html.escape(prompt)}</td><td>step {first[0]}: {_html.escape(first[1])}</td>"
        f"<td>{'' if first == last else f'step {last[0]}: {_html.escape(last[1])}'}</td></tr>"
        for prompt, first, last in voices
    )
    head = "<tr><th>prompt</th><th>first answer</th><th>answer now</th></tr>"
    return wide(f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>")


def page(state: RunState) -> str:
    """Return one self-contained file with the whole curve to point at, offline and without a
    kernel.
    """
    return document(f"{state.report.name} · qlab", payload(state), ESM, html(state), CSS)
