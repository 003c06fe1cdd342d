"""A small local file of foreseen and measured peaks, from which this machine's bands come. Knows no model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from qlab.engine.blas import cache_folder

# lower and upper end as multiples of what is not exact: `make bench-memory` on the CPU, tests/bench/cuda_memory.py on CUDA;
# Metal was not measured, so its band is wide until a step was
_BANDS = {"cpu": (0.94, 1.06), "cuda": (0.75, 1.25), "metal": (0.7, 1.3)}
_ENOUGH = 8  # measurements from which a machine's own band is taken
_KEPT = 400
_LEAST = 0.02  # a band is never narrower than this on either side


def path() -> Path:
    """The file: one JSON object a line."""
    return cache_folder() / "memory.jsonl"


def add(backend: str, foreseen: int, exact: int, measured: int) -> None:
    """Keep one measurement; a folder that cannot be written is no reason to stop a run."""
    line = {"backend": backend, "foreseen": foreseen, "exact": exact, "measured": measured}
    try:
        kept = path().read_text().splitlines()[-_KEPT:] if path().exists() else []
        path().write_text("\n".join([*kept, json.dumps(line)]) + "\n")
    except OSError:
        return


def band(backend: str) -> tuple[float, float]:
    """Return the lower and upper end, as multiples of the foreseen bytes that are not exact."""
    ratios = []
    try:
        for text in path().read_text().splitlines():
            line = json.loads(text)
            if line["backend"] == backend and line["foreseen"] > line["exact"]:
                ratios.append((line["measured"] - line["exact"]) / (line["foreseen"] - line["exact"]))
    except (OSError, ValueError, KeyError, TypeError):  # no file yet, or one that something else wrote
        ratios = []
    if len(ratios) < _ENOUGH:
        return _BANDS[backend]
    low, high = np.quantile(ratios, [0.02, 0.98])
    return min(float(low), 1 - _LEAST), max(float(high), 1 + _LEAST)
