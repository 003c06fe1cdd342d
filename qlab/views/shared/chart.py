"""A small line chart as a picture.

SVG text for an ``<img>``, since untrusted notebooks drop inline SVG.

Knows nothing of runs: it draws named lines with direct labels over a linear axis each.
"""

from __future__ import annotations

import base64
import html as _html
import math
from dataclasses import dataclass

import numpy as np

# distinct for colour-blind readers (Okabe & Ito 2008, without yellow); dashes tell lines apart
# without colour
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
DASHES = ("", "6 3", "2 3", "8 3 2 3")
_LEFT = 48
_RIGHT = 150
_TOP = 14
_BOTTOM = 34
_LABEL_GAP = 13


@dataclass(frozen=True, eq=False)
class Line:
    """One curve.

    Attributes:
        label: written at its end; may be empty.
        x: positions.
        y: heights; NaN leaves a gap in ``dots`` and is bridged in lines.
        color: of the curve.
        dash: SVG dash pattern, or an empty string.
        look: ``line``, ``dots`` (faint points), or ``marked`` (a line with a marker at each point).
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    color: str = PALETTE[0]
    dash: str = ""
    look: str = "line"

    def known(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the points that have a height."""
        there = np.isfinite(self.y)
        return self.x[there], self.y[there]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about ``count`` round numbers between two values."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{k * step:.12g}") for k in range(first, last + 1)]


def robust_range(lines: tuple[Line, ...]) -> tuple[float, float]:
    """Return limits of the heights that leave single spikes of faint points outside."""
    lows = []
    highs = []
    for line in lines:
        _, y = line.known()
        if len(y):
            faint = line.look == "dots"
            lows.append(np.quantile(y, 0.01) if faint else y.min())
            highs.append(np.quantile(y, 0.98) if faint else y.max())
    if not lows:
        return 0.0, 1.0
    low = float(min(lows))
    high = float(max(highs))
    room = (high - low) * 0.05 or max(abs(high) * 0.05, 0.01)
    return low - room, high + room


def image(
    lines: tuple[Line, ...], x_label: str, y_label: str, width: int = 720, height: int = 300
) -> str:
    """Return the chart as an ``<img>``; its alternative text tells the last height of every line."""
    last = "; ".join(
        f"{line.label} {line.known()[1][-1]:.3g}"
        for line in lines
        if line.label and len(line.known()[1])
    )
    data = base64.b64encode(svg(lines, x_label, y_label, width, height).encode()).decode()
    alt = _html.escape(f"{y_label} against {x_label}: {last}")
    return f'<img alt="{alt}" width="{width}" height="{height}" src="data:image/svg+xml;base64,{data}"/>'


def svg(
    lines: tuple[Line, ...], x_label: str, y_label: str, width: int = 720, height: int = 300
) -> str:
    """Return the chart as SVG on white: a picture cannot follow the theme of its page."""
    xs = [x for line in lines if len(x := line.known()[0])]
    x0, x1 = (
        (float(min(x.min() for x in xs)), float(max(x.max() for x in xs))) if xs else (0.0, 1.0)
    )
    y0, y1 = robust_range(lines)
    across = (width - _LEFT - _RIGHT) / ((x1 - x0) or 1)
    down = (height - _TOP - _BOTTOM) / (y1 - y0)

    def at(x: np.ndarray | float, y: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(_LEFT + (x - x0) * across), np.asarray(
            _TOP + (y1 - np.clip(y, y0, y1)) * down
        )

    parts = [f'<rect width="{width}" height="{height}" fill="#fff"/>']
    for value in ticks(y0, y1):
        y = at(x0, value)[1]
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{width - _RIGHT}" stroke="#e2e2e2"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in ticks(x0, x1):
        parts.append(
            f'<text x="{at(value, y0)[0]:.1f}" y="{height - 18}" text-anchor="middle">{value:g}</text>'
        )
    ends: list[tuple[float, float, str, str]] = []
    for line in lines:
        x, y = line.known()
        if not len(x):
            continue
        px, py = at(x, y)
        parts.append(_drawn(line, px, py))
        if line.label:
            ends.append((float(py[-1]), float(px[-1]), line.label, line.color))
    parts += _labels(ends, width - _RIGHT + 6, height - _BOTTOM)
    parts.append(
        f'<text x="{_LEFT}" y="{height - 4}" fill="#555">{_html.escape(f"{y_label}, against {x_label}")}</text>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="11">{"".join(parts)}</svg>'
    )


def _drawn(line: Line, px: np.ndarray, py: np.ndarray) -> str:
    points = [f"{x:.1f} {y:.1f}" for x, y in zip(px, py, strict=True)]
    if line.look == "dots":
        dots = "".join(f"M{p}h0" for p in points)
        return f'<path d="{dots}" stroke="{line.color}" stroke-opacity=".3" stroke-width="3" stroke-linecap="round"/>'
    dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
    drawn = f'<path d="M{"L".join(points)}" fill="none" stroke="{line.color}" stroke-width="1.6"{dash}/>'
    if line.look == "marked":
        marks = "".join(
            f"M{x:.1f} {y - 3.5:.1f}l3.5 3.5-3.5 3.5-3.5-3.5z" for x, y in zip(px, py, strict=True)
        )
        drawn += f'<path d="{marks}" fill="#fff" stroke="{line.color}" stroke-width="1.4"/>'
    return drawn


def _labels(ends: list[tuple[float, float, str, str]], x: float, bottom: float) -> list[str]:
    """Write labels beside the ends of their lines, pushed apart so that none lies on another.

    Led to where lines end early.
    """
    ends = sorted(ends)
    ys = [y for y, _, _, _ in ends]
    for n in range(1, len(ys)):
        ys[n] = max(ys[n], ys[n - 1] + _LABEL_GAP)
    if ys and ys[-1] > bottom:
        ys[-1] = bottom
        for n in range(len(ys) - 2, -1, -1):
            ys[n] = min(ys[n], ys[n + 1] - _LABEL_GAP)
    parts = []
    for y, (end_y, end_x, label, color) in zip(ys, ends, strict=True):
        parts.append(
            f'<text x="{x:.0f}" y="{y + 4:.1f}" fill="{color}">{_html.escape(_short(label))}</text>'
        )
        if x - end_x > 20 or abs(y - end_y) > _LABEL_GAP:
            lead = f"M{end_x + 6:.1f} {end_y:.1f}L{x - 4:.1f} {y:.1f}"
            parts.append(
                f'<path d="{lead}" stroke="{color}" stroke-opacity=".5" stroke-dasharray="1 3"/>'
            )
    return parts


def _short(label: str, most: int = 24) -> str:
    return label if len(label) <= most else label[: most - 1] + "…"
