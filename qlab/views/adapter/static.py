"""The adapter panel without a kernel: one line of text, a table, and a self-contained page.

Sees states, never a model.
"""

from __future__ import annotations

from html import escape

from qlab.core.display import size_text
from qlab.core.panels.adapter import AdapterState
from qlab.views.adapter import report as report_view
from qlab.views.adapter.widget import ESM, STYLES, payload
from qlab.views.shared.wire import document


def text_line(state: AdapterState) -> str:
    """Return one line of numbers."""
    report = state.report
    config = state.config
    layers = "layer" if len(report.layers) == 1 else "layers"
    figures = [
        f"rank {config.rank}",
        f"alpha {config.alpha:g}",
        f"{len(report.layers)} {layers}",
        f"{report.size:,} trainable parameters",
        f"{100 * report.share:.2f} % of the model",
        size_text(report.nbytes),
    ]
    if state.origin:
        figures.append(f"trained: {state.origin}")
    base = f"{config.kind} on {state.spec.name}, {state.storage}"
    return f"Adapter({base}: {', '.join(figures)})"


def html(state: AdapterState) -> str:
    """Return a table made of styled cells, which untrusted notebooks and code hosts show too."""
    config = state.config
    report = state.report
    optimizer, _ = state.optimizer
    whole = size_text(state.training_nbytes)
    line = [
        f"<b>{escape(config.kind)}</b> on <b>{escape(state.spec.name)}</b>, "
        f"{escape(state.storage)}",
        f"rank <b>{config.rank}</b>",
        f"alpha {config.alpha:g} (scale {config.scale:g})",
        report_view.parameters(report),
        f"adapter {size_text(report.nbytes)}, with gradients and {optimizer} {whole}",
    ]
    if config.init != "default":
        line.append(f"starts with <b>{config.init}</b>")
    old = " · measured for another storage" if state.stale else ""
    table = report_view.layers(report, note=old)
    obstacle = f"<p>{escape(state.obstacle)}</p>" if state.obstacle else ""
    code = f"<pre>{escape(state.code)}</pre>"
    return f"<div><p>{' · '.join(line)}</p>{table}{obstacle}{code}</div>"


def page(state: AdapterState) -> str:
    """Return one self-contained file in which the sliders still work, without a kernel."""
    title = f"adapter on {state.spec.name} · qlab"
    return document(title, payload(state), ESM, html(state), STYLES)
