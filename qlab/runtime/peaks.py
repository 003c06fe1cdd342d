"""A small local file of predicted and measured peaks, from which this machine's bands come.

A run adds the peak that it measured; an estimate asks for the band around what it predicts. numpy
only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from qlab.core.config.legal import is_whole
from qlab.runtime.atomic import write_file
from qlab.runtime.paths import cache_folder

# Lower and upper end as multiples of what is not exact: `make bench-memory` on the CPU,
# tests/bench/cuda_memory.py on one H100. Metal was not measured, so its band is wide until this
# machine has measured steps.
SHIPPED = {"cpu": (0.94, 1.06), "cuda": (0.9, 1.2), "metal": (0.7, 1.3)}
_ENOUGH = 8  # measurements from which a machine's own band is taken
_MOST_LINES = 400
_QUANTILES = (0.02, 0.98)
_LEAST_WIDTH = 0.02  # a band is never narrower than this on either side


def path() -> Path:
    """The file: one JSON object a line."""
    return cache_folder() / "memory.jsonl"


def add(backend: str, predicted: int, exact: int, measured: int) -> None:
    """Remember one measurement; a folder that cannot be written is no reason to stop a run.

    The file keeps the latest measurements only.

    Args:
        backend: ``cpu``, ``cuda`` or ``metal``.
        predicted: expected peak in bytes.
        exact: bytes of it that are weights, adapter and optimizer.
        measured: peak in bytes.
    """
    line = {
        "backend": backend,
        "foreseen": int(predicted),  # the key of files that are out there
        "exact": int(exact),
        "measured": int(measured),
    }
    if _ratio(line) is None:
        return
    try:
        lines = [*_lines(), line][-_MOST_LINES:]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_file(path(), lambda new: new.write_text(text))
    except OSError:
        return


def band(backend: str) -> tuple[float, float]:
    """Return the lower and upper end, as multiples of the predicted bytes that are not exact."""
    ratios = [_ratio(line) for line in _lines() if line["backend"] == backend]
    if len(ratios) < _ENOUGH:
        return SHIPPED[backend]
    low, high = np.quantile(np.array(ratios, np.float64), _QUANTILES)
    return min(float(low), 1 - _LEAST_WIDTH), max(float(high), 1 + _LEAST_WIDTH)


def _lines() -> list[dict[str, Any]]:
    """Measurements in the file; what something else wrote there is passed over."""
    try:
        texts = path().read_text(errors="replace").splitlines()
    except OSError:
        return []
    lines = [_parsed(text) for text in texts]
    return [line for line in lines if line is not None and _ratio(line) is not None]


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    is_line = isinstance(line, dict) and isinstance(line.get("backend"), str)
    return line if is_line else None


def _ratio(line: dict[str, Any]) -> float | None:
    """Measured bytes that are not exact, as a multiple of those predicted.

    None if the line says nothing.
    """
    if not all(is_whole(line.get(name)) for name in ("foreseen", "exact", "measured")):
        return None
    predicted = line["foreseen"]
    exact = line["exact"]
    measured = line["measured"]
    if not 0 <= exact < min(predicted, measured):
        return None
    return (measured - exact) / (predicted - exact)
