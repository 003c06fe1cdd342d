"""The quantizer panel without a kernel.

One line of text, tables that survive any viewer, and a self-contained page.

Sees states, never a model.
"""

from __future__ import annotations

import html as _html
import math

from qlab.core.display import size_text, wide
from qlab.core.panels.quantizer import PanelState
from qlab.core.quantize.report import LayerError, QuantReport, report_of
from qlab.views.quantizer.widget import ESM, payload
from qlab.views.shared.wire import document

_ROWS = 12  # layers listed in the static table


def _report(state: PanelState) -> QuantReport:
    return report_of(state.spec, state.table, state.plan, state.calibration)


def text_line(state: PanelState) -> str:
    """Return one line of numbers."""
    report = _report(state)
    own = (
        f", {len(state.plan.overrides)} layers with their own setting"
        if state.plan.overrides
        else ""
    )
    line = (
        f"Quantizer({state.spec.name}: {state.plan.default.label}{own}, {report.bits_per_weight:.2f} bits/weight, "
        f"{size_text(report.nbytes_before)} → {size_text(report.nbytes)}"
    )
    if not math.isnan(report.kl_nats):
        line += f", predicted ΔKL {report.kl_nats:.3g} nats/token"
    return line + ")"


def html(state: PanelState) -> str:
    """Return tables and bars made of styled cells, which untrusted notebooks and code hosts show
    too.
    """
    report = _report(state)
    worst = report.worst(_ROWS)
    predicted = bool(state.calibration) and any(not math.isnan(x.kl_nats) for x in worst)
    costs = [x.kl_nats if predicted else x.relative_error for x in worst]
    top = max((c for c in costs if not math.isnan(c)), default=0) or 1.0
    rows = "".join(_row(layer, cost / top) for layer, cost in zip(worst, costs, strict=True))
    measure = (
        "predicted ΔKL"
        if predicted
        else "weight error (which does not rank layers by their effect on the output)"
    )
    skipped = "".join(
        f"<li>{_html.escape(x.path)}: {_html.escape(x.note)}, {size_text(x.nbytes)}</li>"
        for x in report.skipped
    )
    left_out = f"<details><summary>{len(report.skipped)} layers cannot be quantized</summary><ul>{skipped}</ul></details>"
    table = (
        f"<table><thead><tr><th>worst {len(worst)} of {len(report.layers)} layers by {measure}</th><th>stored as</th>"
        f"<th>weight error</th><th>SQNR</th><th>ΔKL, nats/token</th><th>size</th><th></th></tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )
    return (
        f"<div><p><b>{_html.escape(state.spec.name)}</b> · {_html.escape(state.plan.default.label)} · "
        f"<b>{report.bits_per_weight:.2f}</b> bits/weight · {size_text(report.nbytes_before)} → "
        f"<b>{size_text(report.nbytes)}</b> ({report.nbytes_before / report.nbytes:.2f}× smaller)"
        f"{_kl_text(report)}</p>{wide(table)}{left_out if skipped else ''}<pre>{_html.escape(state.code)}</pre></div>"
    )


def _kl_text(report: QuantReport) -> str:
    return (
        ""
        if math.isnan(report.kl_nats)
        else f" · predicted ΔKL <b>{report.kl_nats:.3g}</b> nats/token"
    )


def _row(layer: LayerError, share: float) -> str:
    width = 0 if math.isnan(share) else max(1, round(120 * share))
    error = "–" if math.isnan(layer.relative_error) else f"{layer.relative_error:.3g} {layer.depth}"
    kl = "–" if math.isnan(layer.kl_nats) else f"{layer.kl_nats:.2g}"
    sqnr = "–" if math.isnan(layer.relative_error) else f"{layer.sqnr_db:.1f} dB"
    label = layer.config.label if layer.config else "kept"
    cells = [
        _html.escape(layer.path),
        _html.escape(label),
        error,
        sqnr,
        kl,
        size_text(layer.nbytes),
    ]
    bar = f'<div style="background:#4c78a8;width:{width}px;height:9px"></div>'
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}<td>{bar}</td></tr>"


def page(state: PanelState) -> str:
    """Return one self-contained file in which the sliders still work, offline and without a kernel."""
    return document(f"{state.spec.name} · qlab", payload(state), ESM, html(state))
