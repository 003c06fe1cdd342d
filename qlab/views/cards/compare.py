"""Draws the comparison of schemes: a chart and a table. Sees a report, never a model."""

from __future__ import annotations

import base64
import html as _html
import math
from dataclasses import dataclass
from typing import Any

from qlab.core.display import size_text, wide
from qlab.core.quantize.compare import CompareReport, SchemePoint


@dataclass(frozen=True)
class Comparison:
    """A comparison as a cell shows it: a chart and a table.

    Attributes:
        report: the figures.
    """

    report: CompareReport

    @property
    def points(self) -> tuple[SchemePoint, ...]:
        """All configs, smallest first."""
        return self.report.points

    @property
    def front(self) -> tuple[SchemePoint, ...]:
        """The configs that no other dominates, smallest first."""
        return self.report.front

    def to_pandas(self) -> Any:
        """Return a data frame, a row a config."""
        return self.report.to_pandas()

    def figure(self) -> Any:
        """Return the chart as a static plotly figure."""
        return figure(self.report)

    def __repr__(self) -> str:
        return repr(self.report)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        # viewers that cannot draw plotly show the table with a picture
        return {
            "application/vnd.plotly.v1+json": self.figure().to_plotly_json(),
            "text/html": html(self.report),
            "text/plain": repr(self),
        }


def figure(report: CompareReport) -> Any:
    """Return a static plotly figure.

    Bits per weight against error, the Pareto front as a line, the rest paler.
    """
    import plotly.graph_objects as go

    def trace(points: list[SchemePoint], **style: Any) -> Any:
        text = [
            f"{p.config.label}<br>{p.bits_per_weight:.2f} bits/weight, {size_text(p.nbytes)}<br>{p.error:.4g}"
            + (f"<br>dominated by {p.dominated_by}" if p.dominated_by else "")
            for p in points
        ]
        xs = [p.bits_per_weight for p in points]
        ys = [p.error for p in points]
        return go.Scatter(x=xs, y=ys, hovertext=text, hoverinfo="text", **style)

    made = go.Figure()
    modes = list(dict.fromkeys(p.config.mode for p in report.points))
    symbols = (
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
    for n, mode in enumerate(modes):
        points = [p for p in report.points if p.config.mode == mode]
        opacity = [0.35 if p.dominated_by else 1.0 for p in points]
        marker = {"symbol": symbols[n % len(symbols)], "size": 9, "opacity": opacity}
        made.add_trace(trace(points, mode="markers", name=mode, marker=marker))
    front = list(report.front)
    labels = [
        f"{p.config.bits}b g{p.config.group_size}" if p.config.mode == "affine" else p.config.mode
        for p in front
    ]
    made.add_trace(
        trace(
            front,
            mode="lines+text",
            name="Pareto front",
            text=labels,
            textposition="top right",
            line={"color": "gray", "width": 1.5},
        )
    )
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
    """Return a table, the smallest first.

    Schemes on the front are bold, others name what dominates them.
    """
    rows = "".join(_row(point) for point in report.points)
    picture = base64.b64encode(svg(report).encode()).decode()
    table = (
        f"<table><thead><tr><th>scheme</th><th>bits/weight</th><th>size</th><th>{_html.escape(report.measure)}</th>"
        f"<th>dominated by</th><th>layers left out</th></tr></thead><tbody>{rows}</tbody></table>"
    )
    return (
        f'<img alt="bits per weight against {_html.escape(report.measure)}" src="data:image/svg+xml;base64,{picture}"/>'
        f"<p><b>{_html.escape(report.model)}</b>: {len(report.front)} of {len(report.points)} schemes are worth having; the "
        f"others are no smaller and no better than one of them.</p>{wide(table)}"
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


def svg(report: CompareReport, width: int = 720, height: int = 380) -> str:
    """Return the chart as an SVG picture.

    Log error against bits per weight, the front joined, the rest hollow.
    """
    left = 60
    bottom = 40
    top = 20
    known = [p for p in report.points if p.error > 0]
    xs = [p.bits_per_weight for p in known]
    ys = [math.log10(p.error) for p in known]
    low = math.floor(min(ys))
    high = math.ceil(max(ys))

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - min(xs)) / (max(xs) - min(xs) or 1)
        return left + across * (width - left - 70), top + (high - y) / (high - low or 1) * (
            height - top - bottom
        )

    parts = [f'<rect width="{width}" height="{height}" fill="#fff"/>']
    for decade in range(low, high + 1):
        _, y = at(min(xs), decade)
        parts.append(
            f'<path d="M{left} {y:.1f}H{width - 10}" stroke="#ddd"/><text x="8" y="{y + 4:.1f}">1e{decade}</text>'
        )
    for bits in range(math.ceil(min(xs)), math.floor(max(xs)) + 1):
        parts.append(
            f'<text x="{at(bits, low)[0]:.1f}" y="{height - 22}" text-anchor="middle">{bits}</text>'
        )
    joined = " ".join(
        "{:.1f},{:.1f}".format(*at(p.bits_per_weight, math.log10(p.error)))
        for p in report.front
        if p.error > 0
    )
    parts.append(f'<polyline points="{joined}" fill="none" stroke="#888"/>')
    labelled = 0.0
    for point, x, y in zip(known, xs, ys, strict=True):
        cx, cy = at(x, y)
        fill = "none" if point.dominated_by else "#4c78a8"
        parts.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="4" fill="{fill}" stroke="#4c78a8"/>')
        if not point.dominated_by and cx - labelled > 48:  # labels must not lie on each other
            labelled = cx
            config = point.config
            name = (
                f"{config.bits}b g{config.group_size}"
                if config.mode == "affine"
                else _html.escape(config.mode)
            )
            parts.append(f'<text x="{cx + 6:.1f}" y="{cy - 4:.1f}">{name}</text>')
    caption = f"bits per weight, whole model, against {_html.escape(report.measure)} (log); hollow: dominated"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="11">{"".join(parts)}<text x="{left}" y="{height - 4}">{caption}</text></svg>'
    )
