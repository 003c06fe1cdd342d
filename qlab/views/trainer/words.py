"""A training run in words and numbers with units: the headline, the state, the summary.

Shared by panel, report and table.

Sees states and reports, draws nothing.
"""

from __future__ import annotations

import math

from qlab.core.display import size_text
from qlab.core.panels.trainer import RunState
from qlab.core.train.report import RunReport

ENDED = ("stopped", "done", "failed")
ICONS = {"idle": "○", "running": "▶", "paused": "‖", "stopped": "■", "done": "✓", "failed": "✕"}
_ALLOWED = {
    "idle": ("start", "learning_rate", "generate"),
    "running": ("pause", "stop", "learning_rate", "generate"),
    "paused": ("resume", "stop", "learning_rate", "generate"),
    "stopped": ("start", "learning_rate", "generate"),
    "done": ("generate",),
    "failed": ("start", "learning_rate", "generate"),
}
NOTHING = "–"


def allowed(state: RunState) -> tuple[str, ...]:
    """Return the intents that make sense now."""
    return _ALLOWED.get(state.report.status, ())


def duration(seconds: float) -> str:
    """Write a time: ``45 s``, ``12 min``, ``2 h 10 min``."""
    if not math.isfinite(seconds):
        return NOTHING
    if seconds < 90:
        return f"{max(seconds, 0):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def loss_text(loss: float) -> str:
    """Write a loss so that it keeps its width while it falls."""
    return NOTHING if not math.isfinite(loss) else f"{loss:.3f}" if abs(loss) < 1 else f"{loss:.2f}"


def count_text(number: float) -> str:
    """Write a whole number in groups of three, with narrow spaces that do not break."""
    return f"{number:,.0f}".replace(",", "\u202f") if math.isfinite(number) else NOTHING


def speed_text(tokens_per_second: float) -> str:
    """Write a speed."""
    return f"{count_text(tokens_per_second)} tokens/s" if tokens_per_second > 0 else NOTHING


def losses(report: RunReport) -> str:
    """Write training and validation loss, such as ``loss 2.31 (val 2.40)``; empty without either."""
    parts = [f"loss {loss_text(report.loss)}"] if math.isfinite(report.loss) else []
    if math.isfinite(report.val_loss):
        parts.append(
            f"(val {loss_text(report.val_loss)})" if parts else f"val {loss_text(report.val_loss)}"
        )
    return " ".join(parts)


def headline(state: RunState) -> str:
    """Return the run in one line: how far, how long, how good, how fast."""
    report = state.report
    if report.status == "idle" and not report.steps:
        far = f"{count_text(report.iters)} steps to do"
    else:
        far = f"step {count_text(report.steps)} of {count_text(report.iters)}"
    if report.status in ENDED:
        time = duration(report.seconds)
    else:
        time = f"{duration(state.seconds_left)} left" if math.isfinite(state.seconds_left) else ""
    speed = speed_text(report.tokens_per_second)
    return " · ".join(
        part for part in (far, time, losses(report), "" if speed == NOTHING else speed) if part
    )


def status_words(state: RunState) -> tuple[str, str]:
    """Return the state as an icon and a word."""
    status = state.report.status
    phase = state.phase
    if phase and phase != "training" and status == "running":
        return "…" if phase == "preparing" else ICONS[status], phase
    word = {"idle": "ready", "running": "training"}.get(status, status)
    return ICONS.get(status, "○"), word


def memory_text(report: RunReport) -> str:
    """Write the measured peak and how far the prediction was from it."""
    if not report.peak_nbytes:
        return (
            f"{size_text(report.predicted_nbytes)} predicted"
            if report.predicted_nbytes
            else NOTHING
        )
    if not report.predicted_nbytes:
        return f"{size_text(report.peak_nbytes)} measured"
    off = report.predicted_nbytes / report.peak_nbytes - 1
    return f"{size_text(report.peak_nbytes)} measured, {size_text(report.predicted_nbytes)} predicted ({off:+.0%})"


def best_text(report: RunReport) -> str:
    """Write the best validation loss and where it was."""
    if not math.isfinite(report.best_val_loss):
        return "no validation"
    return f"{loss_text(report.best_val_loss)} at step {count_text(report.best_step)}"


def summary(report: RunReport) -> list[tuple[str, str]]:
    """Return the lines of the table that a run ends in."""
    return [
        ("model", report.model),
        ("storage", report.storage),
        ("adapter", report.adapter),
        ("steps", f"{count_text(report.steps)} of {count_text(report.iters)}"),
        (
            "training loss",
            f"{loss_text(report.loss)} nats/token" if math.isfinite(report.loss) else NOTHING,
        ),
        (
            "last validation",
            f"{loss_text(report.val_loss)} nats/token"
            if math.isfinite(report.val_loss)
            else NOTHING,
        ),
        ("best validation", best_text(report)),
        ("speed", speed_text(report.tokens_per_second)),
        ("tokens", count_text(report.tokens)),
        ("time in steps", duration(report.seconds)),
        ("peak memory", memory_text(report)),
        ("folder", report.path or "not saved"),
    ]
