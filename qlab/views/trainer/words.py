"""A training run in words and numbers with units: the headline, the status, the summary.

The live panel, the static report, the table of runs and ``qlab.run`` share it.
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


def setup(report: RunReport) -> list[str]:
    """Return model, storage and adapter, as far as they are known."""
    return [part for part in (report.model, report.storage, report.adapter) if part]


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
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def loss_text(loss: float) -> str:
    """Write a loss so that it keeps its width while it falls."""
    if not math.isfinite(loss):
        return NOTHING
    return f"{loss:.3f}" if abs(loss) < 1 else f"{loss:.2f}"


def count_text(number: float) -> str:
    """Write a whole number in groups of three, with narrow spaces that do not break."""
    if not math.isfinite(number):
        return NOTHING
    return f"{number:,.0f}".replace(",", "\u202f")


def speed_text(tokens_per_second: float) -> str:
    """Write a speed."""
    return f"{count_text(tokens_per_second)} tokens/s" if tokens_per_second > 0 else NOTHING


def losses(report: RunReport) -> str:
    """Write training and validation loss, such as ``loss 2.31 (val 2.40)``; may be empty."""
    loss = f"loss {loss_text(report.loss)}" if math.isfinite(report.loss) else ""
    val = f"val {loss_text(report.val_loss)}" if math.isfinite(report.val_loss) else ""
    return f"{loss} ({val})" if loss and val else loss or val


def headline(state: RunState) -> str:
    """Return the run in one line: how far, how long, how good, how fast."""
    report = state.report
    steps = f"step {count_text(report.steps)} of {count_text(report.iters)}"
    if report.status == "idle" and not report.steps:
        steps = f"{count_text(report.iters)} steps to do"
    time = ""
    if report.status in ENDED:
        time = duration(report.seconds)
    elif math.isfinite(state.seconds_left):
        time = f"{duration(state.seconds_left)} left"
    parts = (steps, time, losses(report), speed_text(report.tokens_per_second))
    return " · ".join(part for part in parts if part and part != NOTHING)


def status_words(state: RunState) -> tuple[str, str]:
    """Return the state as an icon and a word."""
    status = state.report.status
    phase = state.phase
    if phase and phase != "training" and status == "running":
        icon = "…" if phase == "preparing" else ICONS[status]
        return icon, phase
    word = {"idle": "ready", "running": "training"}.get(status, status)
    return ICONS.get(status, "○"), word


def memory_text(report: RunReport) -> str:
    """Write the measured peak and how far the prediction was from it."""
    measured = f"{size_text(report.peak_nbytes)} measured"
    predicted = f"{size_text(report.predicted_nbytes)} predicted"
    if not report.peak_nbytes:
        return predicted if report.predicted_nbytes else NOTHING
    if not report.predicted_nbytes:
        return measured
    off = report.predicted_nbytes / report.peak_nbytes - 1
    return f"{measured}, {predicted} ({off:+.0%})"


def best_text(report: RunReport) -> str:
    """Write the best validation loss and where it was."""
    if not math.isfinite(report.best_val_loss):
        return "no validation"
    return f"{loss_text(report.best_val_loss)} at step {count_text(report.best_step)}"


def _nats(loss: float) -> str:
    return f"{loss_text(loss)} nats/token" if math.isfinite(loss) else NOTHING


def summary(report: RunReport) -> list[tuple[str, str]]:
    """Return the lines of the table that a run ends in."""
    return [
        ("model", report.model),
        ("storage", report.storage),
        ("adapter", report.adapter),
        ("steps", f"{count_text(report.steps)} of {count_text(report.iters)}"),
        ("training loss", _nats(report.loss)),
        ("last validation", _nats(report.val_loss)),
        ("best validation", best_text(report)),
        ("speed", speed_text(report.tokens_per_second)),
        ("tokens", count_text(report.tokens)),
        ("time in steps", duration(report.seconds)),
        ("peak memory", memory_text(report)),
        ("folder", report.path or "not saved"),
    ]
