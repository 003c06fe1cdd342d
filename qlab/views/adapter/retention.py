"""What a fuse retains of an adapter, as HTML: a bar for each target, then the worst layers.

Shown in a notebook for what ``Adapter.preview`` returns.
"""

from __future__ import annotations

from html import escape

from qlab.core.adapt.retention import LayerRetention, RetentionReport
from qlab.core.display import view_of
from qlab.views.shared.markup import bullets, table

_ROWS = 12
_BAR = 120  # pixels of a bar for ρ = 1
_HEAD = ("stored as", "‖D‖/‖W‖", "‖E‖/‖D‖", "ρ 16", "ρ 8", "ρ base", "codes changed")


@view_of(RetentionReport)
def html(report: RetentionReport) -> str:
    """Return the report as HTML that needs no script."""
    worst = report.worst(_ROWS)
    layers = f"worst {len(worst)} of {len(report.layers)} layers"
    bars = "".join(_bar(*total) for total in report.totals())
    return (
        f"<p><b>{escape(report.model)}</b> · {escape(report.adapter)} · "
        "share of the change that a fuse retains</p>"
        f"<table>{bars}</table>{bullets(report.notes)}"
        f"{table((layers, *_HEAD), [_cells(layer) for layer in worst])}"
    )


def _bar(target: str, share: float, text: str) -> str:
    width = round(_BAR * min(max(share, 0), 1))
    return (
        f"<tr><td>{target}</td><td style='text-align:right'>{share:.3f}</td>"
        f"<td><div style='background:#4c78a8;height:9px;width:{width}px'></div></td>"
        f"<td>{escape(text)}</td></tr>"
    )


def _cells(layer: LayerRetention) -> list[str]:
    base = _number(layer.kept_base, ".3f")
    least = _number(layer.kept_base_least, ".3f")
    if least != "–":
        base += f" (an expert {least})"
    return [
        layer.path,
        layer.stored or "not quantized",
        _number(layer.relative_size, ".2%"),
        _number(layer.error_ratio, ".2g"),
        _number(layer.kept_16, ".3f"),
        _number(layer.kept_8, ".3f"),
        base,
        _number(layer.codes_changed, ".1%"),
    ]


def _number(value: float, form: str) -> str:
    is_nan = value != value
    return "–" if is_nan else format(value, form)
