"""The adapter panel without a kernel.

One line of text, a table that survives any viewer, and a self-contained page.

Sees states, never a model.
"""

from __future__ import annotations

import html as _html
import math

from qlab.core.adapt.report import LayerAdapter
from qlab.core.display import size_text, wide
from qlab.core.panels.adapter import AdapterState
from qlab.views.adapter.widget import ESM, STYLES, payload
from qlab.views.shared.wire import document

_ROWS = 12  # layers listed in the static table


def text_line(state: AdapterState) -> str:
    """Return one line of numbers."""
    report = state.report
    lora = state.config
    trained = f", trained: {state.origin}" if state.origin else ""
    return (
        f"Adapter({lora.kind} on {state.spec.name}, {state.storage}: rank {lora.rank}, alpha {lora.alpha:g}, "
        f"{len(report.layers)} layer{'s' * (len(report.layers) != 1)}, {report.size:,} trainable numbers, "
        f"{100 * report.share:.2f} % of the model, {size_text(report.nbytes)}{trained})"
    )


def html(state: AdapterState) -> str:
    """Return a table made of styled cells, which untrusted notebooks and code hosts show too."""
    report = state.report
    lora = state.config
    rows = sorted(
        report.layers, key=lambda x: -x.relative_error if math.isfinite(x.relative_error) else 0
    )[:_ROWS]
    measured = any(math.isfinite(x.recovered) for x in rows)
    body = "".join(_row(layer) for layer in rows)
    words = "largest error first" if measured else "nothing measured yet"
    start = "" if lora.init == "default" else f" · starts with <b>{lora.init}</b>"
    old = " · measured for another storage" if state.stale else ""
    note = f"<p>{_html.escape(state.obstacle)}</p>" if state.obstacle else ""
    optimizer, nbytes = state.optimizer
    whole = report.nbytes * 2 + round(report.size * nbytes)
    table = (
        f"<table><thead><tr><th>{len(rows)} of {len(report.layers)} layers, {words}{old}</th><th>trainable</th>"
        f"<th>weight error</th><th>rank {lora.rank} recovers of it, without data</th><th>of that white noise would give</th>"
        f"<th>of the output error, with qera, held out</th><th></th></tr></thead><tbody>{body}</tbody></table>"
    )
    return (
        f"<div><p><b>{_html.escape(lora.kind)}</b> on <b>{_html.escape(state.spec.name)}</b>, {_html.escape(state.storage)} · "
        f"rank <b>{lora.rank}</b> · alpha {lora.alpha:g} (scale {lora.scale:g}) · <b>{report.size:,}</b> trainable numbers, "
        f"{100 * report.share:.2f} % of the model · adapter {size_text(report.nbytes)}, with gradients and {optimizer} "
        f"{size_text(whole)}{start}</p>{wide(table)}{note}<pre>{_html.escape(state.code)}</pre></div>"
    )


def _row(layer: LayerAdapter) -> str:
    share = layer.recovered_output if math.isfinite(layer.recovered_output) else layer.recovered
    width = round(120 * share) if math.isfinite(share) else 0
    error = "–" if math.isnan(layer.relative_error) else f"{layer.relative_error:.3g}"
    shares = [_percent(x) for x in (layer.recovered, layer.recovered_noise, layer.recovered_output)]
    bar = f'<div style="background:#4c78a8;width:{width}px;height:9px"></div>'
    cells = [_html.escape(layer.path), f"{layer.size:,}", error, *shares, bar]
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.1f} %"


def page(state: AdapterState) -> str:
    """Return one self-contained file in which the sliders still work, offline and without a kernel."""
    return document(
        f"adapter on {state.spec.name} · qlab", payload(state), ESM, html(state), STYLES
    )
