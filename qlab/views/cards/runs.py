"""Runs side by side: a table, and their curves over one another; what ``qlab.runs()`` returns."""

from __future__ import annotations

import html as _html
import math
import re
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qlab.core.display import size_text
from qlab.core.train.events import StepEvent
from qlab.core.train.report import RunReport
from qlab.errors import ConfigError
from qlab.views.shared.chart import DASHES, PALETTE, Line, image
from qlab.views.shared.markup import scrollable
from qlab.views.trainer import words
from qlab.views.trainer.curve import LOSS, SMOOTH, VAL, Curve

_POINTS = 300  # of each curve: pictures are saved with the notebook
_HEAD = (
    "run",
    "storage",
    "adapter",
    "steps",
    "loss",
    "best validation",
    "tokens/s",
    "peak (predicted)",
)


@dataclass(frozen=True)
class Runs:
    """Runs as a cell shows them.

    Example:
        >>> runs = qlab.runs()
        >>> runs.reports[runs.best].name
        >>> runs.to_pandas()

    Attributes:
        reports: one report for each run.
        histories: every event of each run, in the same order.

    Raises:
        ConfigError: not one history for each report.
    """

    reports: tuple[RunReport, ...]
    histories: tuple[tuple[StepEvent, ...], ...]

    def __post_init__(self) -> None:
        if len(self.reports) != len(self.histories):
            raise ConfigError(
                f"{len(self.reports)} reports need as many histories, not {len(self.histories)}."
            )

    def __len__(self) -> int:
        return len(self.reports)

    @property
    def best(self) -> int | None:
        """Number of the run with the lowest validation loss; None if none was validated."""
        known = [
            (report.best_val_loss, n)
            for n, report in enumerate(self.reports)
            if math.isfinite(report.best_val_loss)
        ]
        return min(known)[1] if known else None

    def to_pandas(self) -> Any:
        """Return a data frame, a row a run, a column a field of ``RunReport``."""
        import pandas as pd

        return pd.DataFrame(
            [{**asdict(report), "notes": "; ".join(report.notes)} for report in self.reports]
        )

    def plot(self) -> Any:
        """Return the curves as a static plotly figure.

        Training smoothed, validation dashed with markers.
        """
        import plotly.graph_objects as go

        figure = go.Figure()
        for n, (name, history) in enumerate(zip(self._labels(), self.histories, strict=True)):
            color = PALETTE[n % len(PALETTE)]
            rows = _rows(history, 2000)
            validated = np.isfinite(rows[:, VAL])
            common = {"legendgroup": name, "name": name}
            figure.add_trace(
                go.Scatter(
                    x=rows[:, 0], y=rows[:, SMOOTH], mode="lines", line={"color": color}, **common
                )
            )
            figure.add_trace(
                go.Scatter(
                    x=rows[validated, 0],
                    y=rows[validated, VAL],
                    mode="lines+markers",
                    showlegend=False,
                    **common,
                    line={"color": color, "dash": "dash"},
                    marker={"symbol": "diamond", "size": 7},
                )
            )
        figure.update_layout(
            title="training (smoothed) and validation (dashed) loss",
            xaxis_title="step",
            yaxis_title="loss (nats/token)",
            template="plotly_white",
            width=820,
            height=480,
        )
        return figure

    def __repr__(self) -> str:
        if not self.reports:
            return "Runs(none yet)"
        lines = [_HEAD, *self._cells()]
        widths = [max(len(line[i]) for line in lines) for i in range(len(_HEAD))]
        rows = (
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )
        return "\n".join(
            [*rows, *(f"{name}: {report.path}" for name, report in self._named() if report.path)]
        )

    def _repr_html_(self) -> str:
        if not self.reports:
            return "<p>No run has been started in this kernel yet.</p>"
        head = "".join(f"<th style='text-align:left'>{_html.escape(name)}</th>" for name in _HEAD)
        rows = []
        for n, cells in enumerate(self._cells()):
            number, model = cells[0].split(" ", 1)
            swatch = (
                f"<b style='color:{PALETTE[n % len(PALETTE)]}'>{number}</b> {_html.escape(model)}"
            )
            shown = "".join(
                f"<td style='text-align:left'>{_unbroken(cell)}</td>" for cell in cells[1:]
            )
            path = _html.escape(self.reports[n].path)
            first = f"<td style='text-align:left'>{swatch}</td>"
            rows.append(f"<tr title='{path}'>{first}{shown}</tr>")
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        return f"<div>{self._picture()}{scrollable(table)}</div>"

    def _labels(self) -> list[str]:
        """Name runs by number and by what tells them apart."""
        kinds = [
            {getattr(report, part) for report in self.reports}
            for part in ("model", "storage", "adapter")
        ]
        names = []
        for n, report in enumerate(self.reports, 1):
            parts = (report.model, report.storage, report.adapter)
            distinct = [part for part, kind in zip(parts, kinds, strict=True) if len(kind) > 1]
            names.append(" ".join([f"#{n}", *distinct]))
        return names

    def _named(self) -> list[tuple[str, RunReport]]:
        return [(f"#{n}", report) for n, report in enumerate(self.reports, 1)]

    def _cells(self) -> list[tuple[str, ...]]:
        rows = []
        for n, (name, report) in enumerate(self._named()):
            star = " ★" if n == self.best and len(self) > 1 else ""
            steps = f"{words.count_text(report.steps)} of {words.count_text(report.iters)}"
            rows.append(
                (
                    f"{name} {report.model}",
                    report.storage,
                    report.adapter,
                    f"{words.ICONS.get(report.status, '○')} {report.status}, {steps}",
                    words.loss_text(report.loss),
                    words.best_text(report) + star,
                    words.speed_text(report.tokens_per_second).replace(" tokens/s", ""),
                    f"{_size(report.peak_nbytes)} ({_size(report.predicted_nbytes)})",
                )
            )
        return rows

    def _picture(self) -> str:
        lines: list[Line] = []
        for n, (name, history) in enumerate(zip(self._labels(), self.histories, strict=True)):
            rows = _rows(history, _POINTS)
            if not np.isfinite(rows[:, [LOSS, VAL]]).any():
                continue
            color = PALETTE[n % len(PALETTE)]
            dash = DASHES[n // len(PALETTE) % len(DASHES)]
            validated = bool(np.isfinite(rows[:, VAL]).any())
            steps = rows[:, 0]
            label = "" if validated else name
            lines.append(Line(label=label, x=steps, y=rows[:, SMOOTH], color=color, dash=dash))
            if validated:
                validation = Line(
                    label=name,
                    x=steps,
                    y=rows[:, VAL],
                    color=color,
                    dash=dash or "5 3",
                    look="marked",
                )
                lines.append(validation)
        if not lines:
            return ""
        return image(
            tuple(lines),
            "step",
            "loss (nats/token); line: training, smoothed; ◇: validation",
            height=320,
        )


def _size(nbytes: int) -> str:
    return size_text(nbytes) if nbytes else words.NOTHING


def _unbroken(cell: str) -> str:
    """Escape a cell; one of two parts is broken between them if the page is narrow."""
    parts = re.split(r"(?<=,) | (?=\()", _html.escape(cell))
    return (
        " ".join(f"<span style='white-space:nowrap'>{part}</span>" for part in parts)
        if len(parts) > 1
        else parts[0]
    )


def _rows(history: tuple[StepEvent, ...], limit: int) -> np.ndarray:
    curve = Curve(limit)
    curve.extend(history)
    return curve.rows()
