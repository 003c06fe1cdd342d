"""An ``AdapterReport`` as a table: trainable parameters, and what the rank recovers, by layer.

Registers the view of the report; the static form of the adapter panel uses it, too. Bars are
styled cells, which untrusted notebooks and code hosts show where they drop SVG.
"""

from __future__ import annotations

import math
from html import escape

from qlab.core.adapt.report import AdapterReport, LayerAdapter
from qlab.core.display import size_text, view_of
from qlab.views.shared.markup import scrollable

_ROWS = 12  # layers listed
_BAR = 120  # pixels of a full bar
_NOTHING = "–"


@view_of(AdapterReport)
def html(report: AdapterReport) -> str:
    """Return the adapter in a line, and its layers in a table."""
    config = report.config
    line = " · ".join(
        [
            f"<b>{escape(config.kind)}</b>",
            f"rank <b>{config.rank}</b>",
            f"alpha {config.alpha:g} (scale {config.scale:g})",
            parameters(report),
            size_text(report.nbytes),
        ]
    )
    return f"<p>{line}</p>{layers(report)}"


def parameters(report: AdapterReport) -> str:
    """Return the number of trainable parameters, in HTML."""
    return f"<b>{report.size:,}</b> trainable parameters, {100 * report.share:.2f} % of the model"


def layers(report: AdapterReport, note: str = "") -> str:
    """Return the table of layers, the largest error first.

    Args:
        report: the figures.
        note: HTML after the title, such as what the figures were measured for.
    """
    rows = sorted(report.layers, key=_error_or_zero, reverse=True)[:_ROWS]
    measured = any(math.isfinite(row.recovered) for row in rows)
    order = "largest error first" if measured else "nothing measured yet"
    titles = [
        f"{len(rows)} of {len(report.layers)} layers, {order}{note}",
        "trainable",
        "weight error",
        f"rank {report.config.rank} recovers of it, without data",
        "of that white noise would give",
        "of the output error, with qera, held out",
        "",
    ]
    head = "".join(f"<th>{title}</th>" for title in titles)
    body = "".join(_row(row) for row in rows)
    return scrollable(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


def _error_or_zero(layer: LayerAdapter) -> float:
    return layer.relative_error if math.isfinite(layer.relative_error) else 0.0


def _row(layer: LayerAdapter) -> str:
    error = layer.relative_error
    share = layer.recovered_output
    if not math.isfinite(share):
        share = layer.recovered
    cells = [
        escape(layer.path),
        f"{layer.size:,}",
        _NOTHING if math.isnan(error) else f"{error:.3g}",
        _percent(layer.recovered),
        _percent(layer.recovered_noise),
        _percent(layer.recovered_output),
        _bar(share),
    ]
    inner = "".join(f"<td>{cell}</td>" for cell in cells)
    return f"<tr>{inner}</tr>"


def _percent(share: float) -> str:
    return _NOTHING if math.isnan(share) else f"{100 * share:.1f} %"


def _bar(share: float) -> str:
    width = round(_BAR * share) if math.isfinite(share) else 0
    return f'<div style="background:#4c78a8;width:{width}px;height:9px"></div>'
