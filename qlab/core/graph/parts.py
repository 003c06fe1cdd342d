"""What memory is used for.

The parts of an estimate, and which part every array of a step belongs to.

Knows no framework and no budget.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from qlab.core.graph.graph import Graph
from qlab.core.graph.simulate import IDLE, LANDED, TAKEN, Usage

PARTS = {
    "weights": "weights as they are stored",
    "adapter": "the adapter's trainable numbers",
    "optimizer": "the optimizer's state",
    "gradients": "gradients, and the new adapter and state until they replace the old ones",
    "activations": "what the blocks computed and the way back needs",
    "logits": "logits and loss",
    "dequantized": "weights as numbers while a product is made from them",
    "in_flight": "buffers held until the device has caught up",
}
INPUTS = ("weights", "adapter", "optimizer")  # there from the first moment to the last


def labels(graph: Graph, vocabulary: int, trained: Iterable[tuple[int, ...]]) -> dict[int, str]:
    """Return the part of every array of a step, while it is needed.

    Args:
        graph: of the step.
        vocabulary: length of a row of logits.
        trained: shapes of the trained arrays.
    """
    shapes = {s for shape in trained for s in (shape, shape[::-1])}
    made: dict[int, str] = {}
    fixed: set[int] = set()  # what follows from constants alone
    for a, array in graph.arrays.items():
        if array.role:
            made[a] = array.role if array.role in PARTS else "activations"
            if array.role == "constant":
                fixed.add(a)
    for node in graph.nodes:
        if all(a in made for a in node.outputs):
            continue
        if (
            node.name == "Depends"
        ):  # each of its outputs is one of its inputs, whatever it waits for
            for a, source in zip(node.outputs, node.inputs, strict=False):
                made[a] = made[source]
                fixed |= {a} if source in fixed else set()
            continue
        sources = {made[a] for a in node.inputs if a not in fixed}
        constant = all(a in fixed for a in node.inputs)
        for a in node.outputs:
            shape = graph.arrays[a].shape
            if constant:
                fixed.add(a)
                made[a] = "activations"
            elif sources and sources <= {"weights", "dequantized"}:
                made[a] = "dequantized"
            elif (
                shape in shapes
            ):  # first: an adapter on the embedding is as long as the vocabulary too
                made[a] = "gradients"
            else:
                made[a] = "logits" if vocabulary in shape else "activations"
    return made


def over_time(
    usage: Usage, label: dict[int, str], units: dict[int, tuple[int, float]], width: int = 1
) -> np.ndarray:
    """Return use over time, by part and by the quantity that each array's bytes are a multiple of.

    Args:
        usage: of the step.
        label: part of every array.
        units: index of the quantity, and bytes of one unit of it, by array id; bytes themselves if
            it is not there.
        width: number of quantities.

    Returns:
        float64 ``(moments, parts, quantities)``: how many units; parts in the order of ``PARTS``.
    """
    made = np.zeros((len(usage.steps) + 1, len(PARTS), width))
    row = {name: i for i, name in enumerate(PARTS)}
    flight = row["in_flight"]
    for moment, array, nbytes, kind in usage.events:
        part = row[label[array]]
        (where, unit) = units.get(array, (0, 1.0))
        if kind != LANDED:
            made[moment, part, where] += nbytes / unit if kind == TAKEN else -nbytes / unit
        if kind >= IDLE:
            made[moment, flight, where] += nbytes / unit if kind == IDLE else -nbytes / unit
    return np.cumsum(made, axis=0)[:-1]
