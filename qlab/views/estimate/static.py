"""The estimate panel without a kernel: a table that survives any viewer, and a self-contained page.

Sees values, never a model.
"""

from __future__ import annotations

import html as _html

from qlab.core.display import size_text
from qlab.core.graph.parts import INPUTS, PARTS
from qlab.core.memory.estimate import MemoryEstimate
from qlab.core.panels.estimate import EstimateState
from qlab.views.estimate.widget import ESM, STYLES, payload
from qlab.views.shared.wire import document

COLOURS = dict(
    zip(
        PARTS,
        ("#4c78a8", "#72b7b2", "#54a24b", "#9d755d", "#f58518", "#e45756", "#b279a2", "#9a9a9a"),
        strict=True,
    )
)
_WIDTH = 560  # pixels of the bar
_WORDS = {"fits": "✓ fits", "tight": "▲ tight", "does not fit": "✕ does not fit"}


def html(est: MemoryEstimate) -> str:
    """Return tables and bars made of styled cells, which untrusted notebooks and code hosts show
    too.
    """
    train = est.setup.train
    lora = est.setup.adapter
    verdict = est.verdict()
    settings = f"{lora.kind} r{lora.rank}, {train.batch_size} × {train.max_seq_length} tokens, {train.optimizer}"
    settings += ", checkpoints" if train.grad_checkpoint else ""
    rows = "".join(
        f"<tr><td>{_swatch(est, name)} {name}</td><td style='text-align:right'>{size_text(n)}</td><td>{PARTS[name]}</td></tr>"
        for name, n in est.parts.items()
        if n
    )
    notes = "".join(f"<li>{_html.escape(note)}</li>" for note in est.notes)
    return (
        f"<div><p><b>{_html.escape(est.spec.name)}</b> · {_html.escape(est.setup.label)} · {_html.escape(settings)} · "
        f"<b>{size_text(est.total_nbytes)}</b> {est.level} ({size_text(est.low_nbytes)} … {size_text(est.high_nbytes)}), "
        f"peak in {est.moment}<br><b>{_WORDS[verdict.word]}</b> · {_html.escape(est.machine.label)}: "
        f"{_html.escape(verdict.reason)}</p>{_bar(est)}<table>{rows}</table>"
        f"{f'<ul>{notes}</ul>' if notes else ''}<pre>{_html.escape(est.code)}</pre></div>"
    )


def _look(est: MemoryEstimate, name: str) -> str:
    """Solid where bytes are exact or measured, hatched where they are an estimate."""
    if name in INPUTS or est.level == "measured":
        return f"background:{COLOURS[name]}"
    return f"background:repeating-linear-gradient(45deg,{COLOURS[name]} 0 3px,{COLOURS[name]}99 3px 6px)"


def _swatch(est: MemoryEstimate, name: str) -> str:
    return f'<span style="display:inline-block;width:10px;height:10px;{_look(est, name)}"></span>'


def _bar(est: MemoryEstimate) -> str:
    free = est.machine.free_nbytes
    near = est.high_nbytes > free / 5
    top = max(est.high_nbytes, free if near else 0, 1) * 1.02
    width = {name: f"width:{_WIDTH * n / top:.1f}px" for name, n in est.parts.items()}
    parts = "".join(
        f'<div title="{name} {size_text(n)}" style="float:left;height:16px;{width[name]};{_look(est, name)}"></div>'
        for name, n in est.parts.items()
    )
    limit = f'<div style="width:{_WIDTH * free / top:.1f}px;border-right:2px solid #c00;text-align:right;font-size:11px">'
    limit = f"{limit}{size_text(free)} free&nbsp;</div>" if near else ""
    return f'<div style="width:{_WIDTH}px">{limit}<div style="overflow:hidden">{parts}</div></div>'


def page(state: EstimateState) -> str:
    """Return one self-contained file in which the sliders still work, offline and without a kernel."""
    static = html(state.estimate) if state.estimate else _html.escape(state.error)
    return document(f"memory of {state.spec.name} · qlab", payload(state), ESM, static, STYLES)
