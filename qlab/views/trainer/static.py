"""The trainer panel without a kernel: a line of text, a report for any viewer, a page in one file.

``Trainer`` shows these where no live panel can be. They see ``RunState`` values, never a model.
"""

from __future__ import annotations

from html import escape

import numpy as np

from qlab.core.panels.trainer import RunState
from qlab.core.train.events import StepEvent
from qlab.views.shared.chart import PALETTE, Line, image
from qlab.views.shared.markup import scrollable
from qlab.views.shared.wire import document
from qlab.views.trainer import words
from qlab.views.trainer.curve import LOSS, SMOOTH, VAL, Curve
from qlab.views.trainer.widget import CSS, ESM, generations_of, payload

_POINTS = 400  # of the picture: it is saved with the notebook


def text_line(state: RunState) -> str:
    """Return one line of numbers."""
    icon, word = words.status_words(state)
    setup = ", ".join(words.setup(state.report))
    error = f" · {state.error}" if state.error else ""
    return f"Trainer({setup}: {icon} {word} · {words.headline(state)}{error})"


def html(state: RunState) -> str:
    """Return headline, curve and tables, which untrusted notebooks and code hosts show too."""
    icon, word = words.status_words(state)
    setup = " · ".join(escape(part) for part in words.setup(state.report))
    headline = escape(words.headline(state))
    parts = [f"<p><b>{setup}</b> · {icon} {escape(word)} · {headline}</p>"]
    if state.error:
        parts.append(f"<p><b>✕ {escape(state.error)}</b></p>")
    parts.append(picture(state.history))
    parts.append(_summary_table(state))
    parts.append(_notes(state))
    parts.append(_generations_table(state))
    parts.append(_marks(state))
    parts.append(f"<p>{escape(state.data)}</p><pre>{escape(state.code)}</pre>")
    return f"<div>{''.join(parts)}</div>"


def picture(history: tuple[StepEvent, ...]) -> str:
    """Return the loss curve as an ``<img>``; empty before the first step."""
    if not history:
        return ""
    curve = Curve(limit=_POINTS)
    curve.extend(history)
    rows = curve.rows()
    if not np.isfinite(rows[:, [LOSS, VAL]]).any():
        return ""
    step = rows[:, 0]
    lines = (
        Line(label="", x=step, y=rows[:, LOSS], color="#666", look="dots"),
        Line(label="training, smoothed", x=step, y=rows[:, SMOOTH]),
        Line(label="validation", x=step, y=rows[:, VAL], color=PALETTE[1], look="marked"),
    )
    return image(lines, "step", "loss (nats/token)")


def _summary_table(state: RunState) -> str:
    rows = ""
    for name, text in words.summary(state.report)[3:]:  # the first three are in the heading
        rows += f"<tr><th style='text-align:left'>{escape(name)}</th><td>{escape(text)}</td></tr>"
    return f"<table><tbody>{rows}</tbody></table>"


def _notes(state: RunState) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in state.report.notes)
    return f"<ul>{items}</ul>" if items else ""


def _marks(state: RunState) -> str:
    marks = [(event.step, mark.text) for event in state.history for mark in event.marks]
    if not marks:
        return ""
    items = "".join(f"<li>step {step}: {escape(text)}</li>" for step, text in marks)
    return f"<details><summary>{len(marks)} events</summary><ul>{items}</ul></details>"


def _generations_table(state: RunState) -> str:
    generations = generations_of(state)
    if not generations:
        return ""
    rows = ""
    for prompt, first, last in generations:
        now = "" if first == last else _answer(last)
        rows += f"<tr><td>{escape(prompt)}</td><td>{_answer(first)}</td><td>{now}</td></tr>"
    head = "<tr><th>prompt</th><th>first answer</th><th>answer now</th></tr>"
    return scrollable(f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>")


def _answer(generation: list) -> str:
    step, text = generation
    return f"step {step}: {escape(text)}"


def page(state: RunState) -> str:
    """Return one self-contained file with the whole curve, for use offline without a kernel."""
    return document(f"{state.report.name} · qlab", payload(state), ESM, html(state), CSS)
