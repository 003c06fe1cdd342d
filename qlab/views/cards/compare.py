"""Draws the comparison of schemes: a chart and a table.

Registers the view and the figure of ``CompareReport``; sees a report, never a model. The SVG
picture in the table's HTML is for viewers that cannot draw plotly.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from html import escape
from typing import Any

from qlab.core.config.quant import QuantConfig
from qlab.core.display import figure_of, size_text, view_of
from qlab.core.quantize.compare import CompareReport, SchemePoint
from qlab.views.shared.markup import scrollable

_COLOUR = "#4c78a8"
_SYMBOLS = (
    "circle",
    "square",
    "diamond",
    "cross",
    "x",
    "triangle-up",
    "triangle-down",
    "star",
    "hexagon",
)
_HEAD = ("scheme", "bits/weight", "size")
_TAIL = ("dominated by", "layers left out")
_LABEL_WIDTH = 48  # pixels between labels that must not lie on each other


@figure_of(CompareReport)
def figure(report: CompareReport) -> Any:
    """Return a static plotly figure: the Pareto front as a line, dominated configs paler."""
    import plotly.graph_objects as go

    chart = go.Figure()
    modes = dict.fromkeys(point.config.mode for point in report.points)
    for n, mode in enumerate(modes):
        points = [point for point in report.points if point.config.mode == mode]
        opacity = [0.35 if point.dominated_by else 1.0 for point in points]
        marker = {"symbol": _SYMBOLS[n % len(_SYMBOLS)], "size": 9, "opacity": opacity}
        chart.add_trace(_trace(points, mode="markers", name=mode, marker=marker))
    chart.add_trace(
        _trace(
            report.front,
            mode="lines+text",
            name="Pareto front",
            text=[_short_label(point.config) for point in report.front],
            textposition="top right",
            line={"color": "gray", "width": 1.5},
        )
    )
    chart.update_layout(
        title=f"{report.model}: every scheme on the shelf",
        xaxis_title="bits per weight, whole model",
        yaxis_title=report.measure,
        yaxis_type="log",
        template="plotly_white",
        width=820,
        height=480,
    )
    return chart


def _trace(points: Sequence[SchemePoint], **style: Any) -> Any:
    import plotly.graph_objects as go

    return go.Scatter(
        x=[point.bits_per_weight for point in points],
        y=[point.error for point in points],
        hovertext=[_hover_text(point) for point in points],
        hoverinfo="text",
        **style,
    )


def _hover_text(point: SchemePoint) -> str:
    lines = [
        point.config.label,
        f"{point.bits_per_weight:.2f} bits/weight, {size_text(point.nbytes)}",
        f"{point.error:.4g}",
    ]
    if point.dominated_by:
        lines.append(f"dominated by {point.dominated_by}")
    return "<br>".join(lines)


def _short_label(config: QuantConfig) -> str:
    """A label that fits into a chart, such as ``4b g64``."""
    if config.mode == "affine":
        return f"{config.bits}b g{config.group_size}"
    return config.mode


@view_of(CompareReport)
def html(report: CompareReport) -> str:
    """Return a picture and a table, the smallest config first.

    Configs on the front are bold, others name what dominates them.
    """
    picture = base64.b64encode(svg(report).encode()).decode()
    title = escape(f"bits per weight against {report.measure}")
    image = f'<img alt="{title}" src="data:image/svg+xml;base64,{picture}"/>'
    counts = f"{len(report.front)} of {len(report.points)} schemes are worth having"
    sentence = (
        f"<p><b>{escape(report.model)}</b>: {counts}; "
        "the others are no smaller and no better than one of them.</p>"
    )
    head = _cells("th", [*_HEAD, escape(report.measure), *_TAIL])
    rows = "".join(_row(point) for point in report.points)
    table = f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>"
    return f"{image}{sentence}{scrollable(table)}"


def _row(point: SchemePoint) -> str:
    name = escape(point.config.label)
    cells = [
        name if point.dominated_by else f"<b>{name}</b>",
        f"{point.bits_per_weight:.2f}",
        size_text(point.nbytes),
        f"{point.error:.4g}",
        escape(point.dominated_by) or "on the front",
        str(point.skipped_layers or ""),
    ]
    return _cells("td", cells)


def _cells(tag: str, cells: Sequence[str]) -> str:
    inner = "".join(f"<{tag}>{cell}</{tag}>" for cell in cells)
    return f"<tr>{inner}</tr>"


class _Axes:
    """Places of a chart of log error against bits per weight, in pixels."""

    left = 60
    right = 70
    top = 20
    bottom = 40

    def __init__(self, points: Sequence[SchemePoint], width: int, height: int) -> None:
        bits = [point.bits_per_weight for point in points]
        logs = [math.log10(point.error) for point in points]
        self.width = width
        self.height = height
        self.first_bits = min(bits)
        self.last_bits = max(bits)
        self.low = math.floor(min(logs))
        self.high = math.ceil(max(logs))

    def x(self, bits: float) -> float:
        span = self.last_bits - self.first_bits or 1
        share = (bits - self.first_bits) / span
        return self.left + share * (self.width - self.left - self.right)

    def y(self, log_error: float) -> float:
        share = (self.high - log_error) / (self.high - self.low or 1)
        return self.top + share * (self.height - self.top - self.bottom)

    def place(self, point: SchemePoint) -> tuple[float, float]:
        return self.x(point.bits_per_weight), self.y(math.log10(point.error))


def svg(report: CompareReport, width: int = 720, height: int = 380) -> str:
    """Return the chart as an SVG picture.

    Log error against bits per weight, the front joined, dominated configs hollow.
    """
    points = [point for point in report.points if point.error > 0]
    axes = _Axes(points, width, height)
    parts = [
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        *_grid(axes),
        _front_line(report, axes),
        *_dots(points, axes),
    ]
    measure = escape(report.measure)
    caption = f"bits per weight, whole model, against {measure} (log); hollow: dominated"
    parts.append(f'<text x="{axes.left}" y="{height - 4}">{caption}</text>')
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11">'
    )
    return f"{opening}{''.join(parts)}</svg>"


def _grid(axes: _Axes) -> list[str]:
    parts = []
    for decade in range(axes.low, axes.high + 1):
        y = axes.y(decade)
        parts.append(f'<path d="M{axes.left} {y:.1f}H{axes.width - 10}" stroke="#ddd"/>')
        parts.append(f'<text x="8" y="{y + 4:.1f}">1e{decade}</text>')
    for bits in range(math.ceil(axes.first_bits), math.floor(axes.last_bits) + 1):
        place = f'x="{axes.x(bits):.1f}" y="{axes.height - 22}"'
        parts.append(f'<text {place} text-anchor="middle">{bits}</text>')
    return parts


def _front_line(report: CompareReport, axes: _Axes) -> str:
    places = [axes.place(point) for point in report.front if point.error > 0]
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline points="{joined}" fill="none" stroke="#888"/>'


def _dots(points: Sequence[SchemePoint], axes: _Axes) -> list[str]:
    parts = []
    labelled_at = 0.0
    for point in points:
        x, y = axes.place(point)
        fill = "none" if point.dominated_by else _COLOUR
        place = f'cx="{x:.1f}" cy="{y:.1f}" r="4"'
        parts.append(f'<circle {place} fill="{fill}" stroke="{_COLOUR}"/>')
        if not point.dominated_by and x - labelled_at > _LABEL_WIDTH:
            labelled_at = x
            label = escape(_short_label(point.config))
            parts.append(f'<text x="{x + 6:.1f}" y="{y - 4:.1f}">{label}</text>')
    return parts
