"""A small local file of foreseen and measured peaks, from which this machine's bands come.

Knows no model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from qlab.core.config.legal import is_whole
from qlab.runtime.atomic import write_file
from qlab.runtime.paths import cache_folder

# lower and upper end as multiples of what is not exact: `make bench-memory` on the CPU,
# tests/bench/cuda_memory.py on one H100; Metal was not measured, so its band is wide until a step
# was
SHIPPED = {"cpu": (0.94, 1.06), "cuda": (0.9, 1.2), "metal": (0.7, 1.3)}
_ENOUGH = 8  # measurements from which a machine's own band is taken
_KEPT = 400
_LEAST = 0.02  # a band is never narrower than this on either side


def path() -> Path:
    """The file: one JSON object a line."""
    return cache_folder() / "memory.jsonl"


def add(backend: str, foreseen: int, exact: int, measured: int) -> None:
    """Keep one measurement; a folder that cannot be written is no reason to stop a run.

    The file is replaced whole, so nobody ever reads half of it, and keeps the latest measurements
    only.

    Args:
        backend: ``cpu``, ``cuda`` or ``metal``.
        foreseen: expected peak in bytes.
        exact: bytes of it that are weights, adapter and optimizer.
        measured: peak in bytes.
    """
    line = {
        "backend": backend,
        "foreseen": int(foreseen),
        "exact": int(exact),
        "measured": int(measured),
    }
    if _ratio(line) is None:
        return
    try:
        lines = [*_lines(), line][-_KEPT:]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_file(path(), lambda new: new.write_text(text))
    except OSError:
        return


def band(backend: str) -> tuple[float, float]:
    """Return the lower and upper end, as multiples of the foreseen bytes that are not exact."""
    ratios = [
        ratio
        for line in _lines()
        if line["backend"] == backend and (ratio := _ratio(line)) is not None
    ]
    if len(ratios) < _ENOUGH:
        return SHIPPED[backend]
    low, high = np.quantile(ratios, [0.02, 0.98])
    return min(float(low), 1 - _LEAST), max(float(high), 1 + _LEAST)


def _lines() -> list[dict[str, Any]]:
    """Measurements in the file; what something else wrote there is passed over."""
    try:
        texts = path().read_text(errors="replace").splitlines()
    except OSError:
        return []
    return [
        line for text in texts if (line := _parsed(text)) is not None and _ratio(line) is not None
    ]


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("backend"), str) else None


def _ratio(line: dict[str, Any]) -> float | None:
    """Measured bytes that are not exact as a multiple of those foreseen.

    None if the line says nothing.
    """
    sizes = [line.get(name) for name in ("foreseen", "exact", "measured")]
    if not all(is_whole(n) for n in sizes):
        return None
    foreseen, exact, measured = sizes
    return (measured - exact) / (foreseen - exact) if 0 <= exact < min(foreseen, measured) else None
