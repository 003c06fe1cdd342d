"""The quantizer panel without a kernel: one line of text, tables, and a self-contained page.

Sees states, never a model.
"""

from __future__ import annotations

import math
from html import escape

from qlab.core.display import size_text
from qlab.core.panels.quantizer import QuantizerState
from qlab.core.quantize.report import QuantReport, report_of
from qlab.views.quantizer import report as report_view
from qlab.views.quantizer.widget import ESM, payload
from qlab.views.shared.wire import document


def _report(state: QuantizerState) -> QuantReport:
    return report_of(state.spec, state.table, state.plan, state.calibration)


def text_line(state: QuantizerState) -> str:
    """Return one line of numbers."""
    report = _report(state)
    storage = state.plan.default.label
    if state.plan.overrides:
        storage += f", {len(state.plan.overrides)} layers with overrides"
    figures = [
        f"{state.spec.name}: {storage}",
        f"{report.bits_per_weight:.2f} bits/weight",
        f"{size_text(report.nbytes_before)} → {size_text(report.nbytes)}",
    ]
    if not math.isnan(report.kl_nats):
        figures.append(f"predicted ΔKL {report.kl_nats:.3g} nats/token")
    return f"Quantizer({', '.join(figures)})"


def html(state: QuantizerState) -> str:
    """Return tables and bars that untrusted notebooks and code hosts show too."""
    tables = report_view.tables(_report(state), headline=f"<b>{escape(state.spec.name)}</b>")
    return f"<div>{tables}<pre>{escape(state.code)}</pre></div>"


def page(state: QuantizerState) -> str:
    """Return one self-contained file in which the sliders still work, without a kernel."""
    return document(f"{state.spec.name} · qlab", payload(state), ESM, html(state))
