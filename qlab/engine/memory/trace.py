"""The peak of a step whose whole graph is at hand: replay it as this machine's back end runs it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

from qlab.core.graph.graph import Graph
from qlab.core.graph.parts import PARTS, labels, over_time
from qlab.core.graph.simulate import Runahead, simulate
from qlab.runtime.device import backend

# operations of a task, and tasks that may be unfinished (mlx/backend/*/eval.cpp, mlx/scheduler.h):
# the CPU's as in its source, CUDA's set by eight steps on one H100 (docs/guide/memory_accuracy.md),
# Metal's read, not measured
_OPERATIONS_A_TASK = {"cpu": 10, "cuda": 27, "metal": 40}
_TASKS = 11


class StepPeak(NamedTuple):
    """The peak of a step.

    Attributes:
        moment: ``forward``, ``loss``, ``backward`` or ``update``.
        parts: bytes by part, as in ``MemoryEstimate.parts``.
    """

    moment: str
    parts: dict[str, float]


def runahead() -> Runahead:
    """Return how far the host runs ahead of the device here.

    What is dispatched but unfinished holds its buffers. On a GPU, MLX's own setting counts:
    ``MLX_MAX_OPS_PER_BUFFER``, read by MLX from the environment.
    """
    name = backend()
    operations = _OPERATIONS_A_TASK[name]
    setting = os.environ.get("MLX_MAX_OPS_PER_BUFFER", "")
    if name != "cpu" and setting.isdigit() and int(setting) > 0:
        operations = int(setting)
    return Runahead(_TASKS * operations, kernels=name != "cpu")


def traced_peak(graph: Graph, vocabulary: int, trained: Sequence[tuple[int, ...]]) -> StepPeak:
    """Return the peak of a step, by its graph.

    Args:
        graph: of the whole step.
        vocabulary: length of a row of logits; it tells them from other arrays.
        trained: shapes of the trained arrays.
    """
    usage = simulate(graph, runahead())
    part_of = labels(graph, vocabulary, trained)
    peak = int(usage.timeline.argmax())
    loss = [
        moment
        for moment, node in enumerate(usage.steps)
        if any(part_of[array] == "logits" for array in graph.nodes[node].outputs)
    ]
    if peak < loss[0]:
        name = "forward"
    elif peak <= loss[-1]:
        name = "loss"
    else:
        name = "backward"
    # (moments, parts, products): without units there is one product, plain bytes
    nbytes = over_time(usage, part_of, {})[peak, :, 0]
    return StepPeak(name, dict(zip(PARTS, nbytes.tolist(), strict=True)))
