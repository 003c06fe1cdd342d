"""A ``QuantReport`` as tables: what a plan costs, and the layers that it costs most.

Registers the view of the report; the static form of the quantizer panel uses it, too. Bars are
styled cells, which untrusted notebooks and code hosts show where they drop SVG.
"""

from __future__ import annotations

import math
from html import escape

from qlab.core.display import size_text, view_of
from qlab.core.quantize.report import LayerError, QuantReport
from qlab.views.shared.markup import scrollable

_ROWS = 12  # layers listed
_BAR = 120  # pixels of the longest bar
_NOTHING = "–"
_BY_ERROR = "weight error (which does not rank layers by their effect on the output)"
_HEAD = ("stored as", "weight error", "SQNR", "ΔKL, nats/token", "size", "")


@view_of(QuantReport)
def html(report: QuantReport) -> str:
    """Return the figures of the whole model, and its worst layers with bars."""
    return tables(report)


def tables(report: QuantReport, headline: str = "") -> str:
    """Return what ``html`` returns, after a headline.

    Args:
        report: the figures.
        headline: HTML before the figures of the whole model, such as the model's name.
    """
    smaller = report.nbytes_before / report.nbytes
    figures = [
        escape(report.plan.default.label),
        f"<b>{report.bits_per_weight:.2f}</b> bits/weight",
        f"{size_text(report.nbytes_before)} → <b>{size_text(report.nbytes)}</b> "
        f"({smaller:.2f}× smaller)",
    ]
    if not math.isnan(report.kl_nats):
        figures.append(f"predicted ΔKL <b>{report.kl_nats:.3g}</b> nats/token")
    if headline:
        figures.insert(0, headline)
    line = " · ".join(figures)
    return f"<p>{line}</p>{scrollable(_worst_layers(report))}{_skipped(report)}"


def _worst_layers(report: QuantReport) -> str:
    worst = report.worst(_ROWS)
    by_kl = any(not math.isnan(layer.kl_nats) for layer in worst)
    measure = "predicted ΔKL" if by_kl else _BY_ERROR
    costs = [layer.kl_nats if by_kl else layer.relative_error for layer in worst]
    largest = max((cost for cost in costs if not math.isnan(cost)), default=0) or 1.0
    rows = [_row(layer, cost / largest) for layer, cost in zip(worst, costs, strict=True)]
    first = f"worst {len(worst)} of {len(report.layers)} layers by {measure}"
    head = "".join(f"<th>{name}</th>" for name in (first, *_HEAD))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _row(layer: LayerError, share: float) -> str:
    measured = not math.isnan(layer.relative_error)
    cells = [
        escape(layer.path),
        escape(layer.config.label) if layer.config else "not quantized",
        f"{layer.relative_error:.3g} {layer.depth}" if measured else _NOTHING,
        f"{layer.sqnr_db:.1f} dB" if measured else _NOTHING,
        _NOTHING if math.isnan(layer.kl_nats) else f"{layer.kl_nats:.2g}",
        size_text(layer.nbytes),
        _bar(share),
    ]
    inner = "".join(f"<td>{cell}</td>" for cell in cells)
    return f"<tr>{inner}</tr>"


def _bar(share: float) -> str:
    width = 0 if math.isnan(share) else max(1, round(_BAR * share))
    return f'<div style="background:#4c78a8;width:{width}px;height:9px"></div>'


def _skipped(report: QuantReport) -> str:
    """Return the layers that no scheme of the plan can store, folded away."""
    skipped = report.skipped
    if not skipped:
        return ""
    items = [
        f"<li>{escape(layer.path)}: {escape(layer.note)}, {size_text(layer.nbytes)}</li>"
        for layer in skipped
    ]
    title = f"<summary>{len(skipped)} layers cannot be quantized</summary>"
    return f"<details>{title}<ul>{''.join(items)}</ul></details>"
