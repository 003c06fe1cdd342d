"""A small line chart as a picture: SVG text for an ``<img>``.

Untrusted notebooks drop inline SVG and show pictures. The chart knows nothing of runs: it draws
named lines with direct labels over linear axes. The run cards use it.
"""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from html import escape

import numpy as np

# distinct for colour-blind readers (Okabe & Ito 2008, without yellow); dashes tell lines apart
# without colour
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
DASHES = ("", "6 3", "2 3", "8 3 2 3")

# margins and distances in pixels
_LEFT = 48
_RIGHT = 150
_TOP = 14
_BOTTOM = 34
_LABEL_GAP = 13
_LONGEST_LABEL = 24  # letters


@dataclass(frozen=True, eq=False, kw_only=True)
class Line:
    """One curve.

    Attributes:
        label: written at its end; may be empty.
        x: positions, ``(N,)``.
        y: heights, ``(N,)``; NaN leaves a gap in ``dots`` and is bridged in lines.
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
        finite = np.isfinite(self.y)
        return self.x[finite], self.y[finite]


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """Where values of the axes lie in the picture.

    Attributes:
        x: lowest and highest position.
        y: lowest and highest height.
        width: of the picture, in pixels.
        height: of the picture, in pixels.
    """

    x: tuple[float, float]
    y: tuple[float, float]
    width: int
    height: int

    def across(self, x: np.ndarray | float) -> np.ndarray:
        """Return positions as pixels from the left."""
        low, high = self.x
        room = self.width - _LEFT - _RIGHT
        return np.asarray(_LEFT + (x - low) * room / ((high - low) or 1))

    def down(self, y: np.ndarray | float) -> np.ndarray:
        """Return heights as pixels from the top; what lies outside stands at the edge."""
        low, high = self.y
        room = self.height - _TOP - _BOTTOM
        return np.asarray(_TOP + (high - np.clip(y, low, high)) * room / (high - low))


@dataclass(frozen=True, kw_only=True)
class _End:
    """Where a line ends, in pixels, and what is written there."""

    y: float
    x: float
    label: str
    color: str


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about ``count`` round numbers between two values."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    steps = (power * factor for factor in (1, 2, 5, 10))
    step = next(step for step in steps if step >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


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
    """Return the chart as an ``<img>``; its alternative text says the last height of every line.

    Args:
        lines: what to draw.
        x_label: name of the positions.
        y_label: name of the heights.
        width: in pixels.
        height: in pixels.
    """
    heights = []
    for line in lines:
        _, y = line.known()
        if line.label and len(y):
            heights.append(f"{line.label} {y[-1]:.3g}")
    alt = escape(f"{y_label} against {x_label}: {'; '.join(heights)}")
    data = base64.b64encode(svg(lines, x_label, y_label, width, height).encode()).decode()
    source = f"data:image/svg+xml;base64,{data}"
    return f'<img alt="{alt}" width="{width}" height="{height}" src="{source}"/>'


def svg(
    lines: tuple[Line, ...], x_label: str, y_label: str, width: int = 720, height: int = 300
) -> str:
    """Return the chart as SVG on white: a picture cannot follow the theme of its page."""
    frame = _Frame(x=_x_range(lines), y=robust_range(lines), width=width, height=height)
    parts = [f'<rect width="{width}" height="{height}" fill="#fff"/>', *_axes(frame)]
    ends = []
    for line in lines:
        x, y = line.known()
        if not len(x):
            continue
        across = frame.across(x)
        down = frame.down(y)
        parts.append(_curve(line, across, down))
        if line.label:
            end_x = float(across[-1])
            end_y = float(down[-1])
            ends.append(_End(x=end_x, y=end_y, label=line.label, color=line.color))
    parts += _labels(ends, width - _RIGHT + 6, height - _BOTTOM)
    names = escape(f"{y_label}, against {x_label}")
    parts.append(f'<text x="{_LEFT}" y="{height - 4}" fill="#555">{names}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">'
        f"{''.join(parts)}</svg>"
    )


def _x_range(lines: tuple[Line, ...]) -> tuple[float, float]:
    positions = [line.known()[0] for line in lines]
    positions = [x for x in positions if len(x)]
    if not positions:
        return 0.0, 1.0
    return float(min(x.min() for x in positions)), float(max(x.max() for x in positions))


def _axes(frame: _Frame) -> list[str]:
    """Draw a line across at every round height, and write the round numbers of both axes."""
    parts = []
    for value in ticks(*frame.y):
        y = frame.down(value)
        across = f"M{_LEFT} {y:.1f}H{frame.width - _RIGHT}"
        parts.append(f'<path d="{across}" stroke="#e2e2e2"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    below = frame.height - 18
    for value in ticks(*frame.x):
        x = frame.across(value)
        parts.append(f'<text x="{x:.1f}" y="{below}" text-anchor="middle">{value:g}</text>')
    return parts


def _curve(line: Line, across: np.ndarray, down: np.ndarray) -> str:
    points = [f"{x:.1f} {y:.1f}" for x, y in zip(across, down, strict=True)]
    if line.look == "dots":
        dots = "".join(f"M{point}h0" for point in points)
        faint = 'stroke-opacity=".3" stroke-width="3" stroke-linecap="round"'
        return f'<path d="{dots}" stroke="{line.color}" {faint}/>'
    dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
    path = "M" + "L".join(points)
    curve = f'<path d="{path}" fill="none" stroke="{line.color}" stroke-width="1.6"{dash}/>'
    if line.look != "marked":
        return curve
    diamonds = "".join(
        f"M{x:.1f} {y - 3.5:.1f}l3.5 3.5-3.5 3.5-3.5-3.5z"
        for x, y in zip(across, down, strict=True)
    )
    marks = f'<path d="{diamonds}" fill="#fff" stroke="{line.color}" stroke-width="1.4"/>'
    return curve + marks


def _labels(ends: list[_End], x: float, bottom: float) -> list[str]:
    """Write labels beside the ends of their lines, pushed apart so that none covers another.

    A dotted line leads to a label that does not stand right beside its end.

    Args:
        ends: of the lines, with their labels.
        x: where labels begin, in pixels.
        bottom: lowest place for a label, in pixels.
    """
    ends = sorted(ends, key=lambda end: (end.y, end.x, end.label))
    parts = []
    for end, y in zip(ends, _apart([end.y for end in ends], bottom), strict=True):
        text = escape(_short(end.label))
        parts.append(f'<text x="{x:.0f}" y="{y + 4:.1f}" fill="{end.color}">{text}</text>')
        if x - end.x > 20 or abs(y - end.y) > _LABEL_GAP:
            lead = f"M{end.x + 6:.1f} {end.y:.1f}L{x - 4:.1f} {y:.1f}"
            dotted = 'stroke-opacity=".5" stroke-dasharray="1 3"'
            parts.append(f'<path d="{lead}" stroke="{end.color}" {dotted}/>')
    return parts


def _apart(heights: list[float], bottom: float) -> list[float]:
    """Push ascending heights apart: downwards first, then up from the bottom."""
    apart = list(heights)
    for n in range(1, len(apart)):
        apart[n] = max(apart[n], apart[n - 1] + _LABEL_GAP)
    if apart and apart[-1] > bottom:
        apart[-1] = bottom
        for n in reversed(range(len(apart) - 1)):
            apart[n] = min(apart[n], apart[n + 1] - _LABEL_GAP)
    return apart


def _short(label: str) -> str:
    if len(label) <= _LONGEST_LABEL:
        return label
    return label[: _LONGEST_LABEL - 1] + "…"
