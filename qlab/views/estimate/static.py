"""Estimates, tables of them and advice as HTML that untrusted notebooks and code hosts show too.

No script, no vector graphics: bars are styled cells. ``page`` alone carries the panel's script.
"""

from __future__ import annotations

from html import escape

from qlab.core.display import size_text, view_of
from qlab.core.graph.parts import INPUTS, PARTS
from qlab.core.memory.advice import Advice
from qlab.core.memory.estimate import MemoryEstimate
from qlab.core.memory.table import EstimateTable
from qlab.core.panels.estimate import EstimateState
from qlab.views.shared.markup import bullets, table

COLOURS = {
    "weights": "#4c78a8",
    "adapter": "#72b7b2",
    "optimizer": "#54a24b",
    "gradients": "#9d755d",
    "activations": "#f58518",
    "logits": "#e45756",
    "dequantized": "#b279a2",
    "in_flight": "#9a9a9a",
}
_BAR_WIDTH = 560  # pixels
_AXIS_MARGIN = 1.02  # of the bar's right end beyond what it must show
_WORDS = {"fits": "✓ fits", "tight": "▲ tight", "does not fit": "✕ does not fit"}


@view_of(MemoryEstimate)
def html(est: MemoryEstimate) -> str:
    """Return an estimate as a headline, a bar over the budget and a table of its parts."""
    range_text = f"{size_text(est.low_nbytes)} … {size_text(est.high_nbytes)}"
    verdict = est.verdict()
    name = escape(est.spec.name)
    settings = escape(f"{est.setup.label} · {_settings(est)}")
    machine = escape(f"{est.machine.label}: {verdict.reason}")
    return (
        f"<div><p><b>{name}</b> · {settings} · "
        f"<b>{size_text(est.total_nbytes)}</b> {est.level} ({range_text}), "
        f"peak in {est.moment}<br><b>{_WORDS[verdict.word]}</b> · {machine}</p>"
        f"{_bar(est)}{_parts_table(est)}{bullets(est.notes)}<pre>{escape(est.code)}</pre></div>"
    )


def _settings(est: MemoryEstimate) -> str:
    train = est.setup.train
    lora = est.setup.adapter
    rows = f"{train.batch_size} × {train.max_seq_length} tokens"
    words = [f"{lora.kind} r{lora.rank}", rows, train.optimizer]
    if train.grad_checkpoint:
        words.append("checkpoints")
    return ", ".join(words)


def _parts_table(est: MemoryEstimate) -> str:
    rows = []
    for name, nbytes in est.parts.items():
        if nbytes:
            size = f"<td style='text-align:right'>{size_text(nbytes)}</td>"
            rows.append(
                f"<tr><td>{_swatch(est, name)} {name}</td>{size}<td>{PARTS[name]}</td></tr>"
            )
    return f"<table>{''.join(rows)}</table>"


def _fill(est: MemoryEstimate, name: str) -> str:
    """Return a part's style: solid where bytes are exact or measured, hatched where estimated."""
    colour = COLOURS[name]
    if name in INPUTS or est.level == "measured":
        return f"background:{colour}"
    stripes = f"{colour} 0 3px,{colour}99 3px 6px"
    return f"background:repeating-linear-gradient(45deg,{stripes})"


def _swatch(est: MemoryEstimate, name: str) -> str:
    style = f"display:inline-block;width:10px;height:10px;{_fill(est, name)}"
    return f'<span style="{style}"></span>'


def _bar(est: MemoryEstimate) -> str:
    """Return the parts side by side, under the budget's mark where that is near."""
    free = est.machine.free_nbytes
    near = est.high_nbytes > free / 5
    right_end = _AXIS_MARGIN * max(est.high_nbytes, free if near else 0, 1)

    def width(nbytes: int) -> str:
        return f"width:{_BAR_WIDTH * nbytes / right_end:.1f}px"

    parts = []
    for name, nbytes in est.parts.items():
        style = f"float:left;height:16px;{width(nbytes)};{_fill(est, name)}"
        parts.append(f'<div title="{name} {size_text(nbytes)}" style="{style}"></div>')
    limit = ""
    if near:
        style = f"{width(free)};border-right:2px solid #c00;text-align:right;font-size:11px"
        limit = f'<div style="{style}">{size_text(free)} free&nbsp;</div>'
    bar = f'<div style="overflow:hidden">{"".join(parts)}</div>'
    return f'<div style="width:{_BAR_WIDTH}px">{limit}{bar}</div>'


@view_of(EstimateTable)
def table_html(estimates: EstimateTable) -> str:
    """Return estimates side by side, a row each."""
    head, *rows = estimates.cells()
    return table(head, rows)


@view_of(Advice)
def advice_html(advice: Advice) -> str:
    """Return what to choose, why, and the Python that sets it."""
    text = f"<p><b>{escape(advice.choice)}</b>: {escape(advice.reason)}</p>"
    if not advice.code:
        return text
    return f"{text}<pre>{escape(advice.code)}</pre>"


def state_html(state: EstimateState) -> str:
    """Return what a panel shows, or why it shows nothing."""
    return html(state.estimate) if state.estimate else escape(state.error)


def text_line(state: EstimateState) -> str:
    """Return what a panel shows, as text."""
    return repr(state.estimate) if state.estimate else state.error


def page(state: EstimateState) -> str:
    """Return one self-contained file in which the sliders still work, offline, without a kernel."""
    # the panel's widget is needed here only; a script that prints an estimate must not load it
    from qlab.views.estimate.widget import ESM, STYLES, payload
    from qlab.views.shared.wire import document

    title = f"memory of {state.spec.name} · qlab"
    return document(title, payload(state), ESM, state_html(state), STYLES)
