"""Draws the comparison of schemes: a chart and a table. Sees a report, never a model."""

from __future__ import annotations

import html as _html
from typing import Any

from qlab.core.compare import CompareReport, SchemePoint
from qlab.views.quantizer_text import size_text


def figure(report: CompareReport) -> Any:
    """Return a static plotly figure: bits per weight against error, the Pareto front as a line, the rest paler."""
    import plotly.graph_objects as go

    def trace(points: list[SchemePoint], **style: Any) -> Any:
        text = [
            f"{p.config.label}<br>{p.bits_per_weight:.2f} bits/weight, {size_text(p.nbytes)}<br>{p.error:.4g}"
            + (f"<br>dominated by {p.dominated_by}" if p.dominated_by else "")
            for p in points
        ]
        xs, ys = [p.bits_per_weight for p in points], [p.error for p in points]
        return go.Scatter(x=xs, y=ys, hovertext=text, hoverinfo="text", **style)

    made = go.Figure()
    modes = list(dict.fromkeys(p.config.mode for p in report.points))
    symbols = ("circle", "square", "diamond", "cross", "x", "triangle-up", "triangle-down", "star", "hexagon")
    for n, mode in enumerate(modes):
        points = [p for p in report.points if p.config.mode == mode]
        opacity = [0.35 if p.dominated_by else 1.0 for p in points]
        marker = {"symbol": symbols[n % len(symbols)], "size": 9, "opacity": opacity}
        made.add_trace(trace(points, mode="markers", name=mode, marker=marker))
    front = list(report.front)
    labels = [f"{p.config.bits}b g{p.config.group_size}" if p.config.mode == "affine" else p.config.mode for p in front]
    made.add_trace(
        trace(front, mode="lines+text", name="Pareto front", text=labels, textposition="top right",
              line={"color": "gray", "width": 1.5})
    )  # fmt: skip
    made.update_layout(
        title=f"{report.model}: every scheme on the shelf",
        xaxis_title="bits per weight, whole model",
        yaxis_title=report.measure,
        yaxis_type="log",
        template="plotly_white",
        width=820,
        height=480,
    )
    return made


def html(report: CompareReport) -> str:
    """Return a table, the smallest first; schemes on the front are bold, others name what dominates them."""
    rows = "".join(_row(point) for point in report.points)
    return (
        f"<p><b>{_html.escape(report.model)}</b>: {len(report.front)} of {len(report.points)} schemes are worth having; the "
        f"others are no smaller and no better than one of them.</p><table><thead><tr><th>scheme</th><th>bits/weight</th>"
        f"<th>size</th><th>{_html.escape(report.measure)}</th><th>dominated by</th><th>layers left out</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )


def _row(point: SchemePoint) -> str:
    name = _html.escape(point.config.label)
    cells = [
        name if point.dominated_by else f"<b>{name}</b>",
        f"{point.bits_per_weight:.2f}",
        size_text(point.nbytes),
        f"{point.error:.4g}",
        _html.escape(point.dominated_by) or "on the front",
        str(point.skipped_layers or ""),
    ]
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
