"""What memory is used for: the parts of an estimate, and which part every array belongs to.

``Forecast`` and ``formula`` call ``labels`` for a step's graph and ``over_time`` for its
simulation. Knows no framework and no budget.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from qlab.core.graph.buffers import Change
from qlab.core.graph.graph import Array, Graph, Node, Shape
from qlab.core.graph.simulate import Usage

PARTS = {
    "weights": "weights as they are stored",
    "adapter": "the adapter's trainable parameters",
    "optimizer": "the optimizer's state",
    "gradients": "gradients, and the new adapter and state until they replace the old ones",
    "activations": "what the blocks computed and the backward pass needs",
    "logits": "logits and loss",
    "dequantized": "dequantized weights while a product is made from them",
    "in_flight": "buffers held until the device has caught up",
}
INPUTS = ("weights", "adapter", "optimizer")  # there from the first moment to the last
ROW = {name: row for row, name in enumerate(PARTS)}
"""Place of each part in an array that has them all."""


class Unit(NamedTuple):
    """What an array's bytes are a multiple of.

    Attributes:
        quantity: its index, such as that of batch · tokens.
        nbytes: bytes of one unit of it, at the sizes that were simulated.
    """

    quantity: int
    nbytes: float


_BYTES = Unit(0, 1.0)


def labels(graph: Graph, vocabulary: int, trained: Iterable[Shape]) -> dict[int, str]:
    """Return the part of every array of a step, by id, while it is needed.

    Args:
        graph: of the step.
        vocabulary: length of a row of logits.
        trained: shapes of the trained arrays.
    """
    return _Labels(graph, vocabulary, trained).parts


class _Labels:
    """Labels arrays one after another: each follows from its own shape and from its sources'.

    Attributes:
        parts: by array id.
    """

    def __init__(self, graph: Graph, vocabulary: int, trained: Iterable[Shape]) -> None:
        self._graph = graph
        self._vocabulary = vocabulary
        # a gradient may lie turned round on its way
        self._trained = {turned for shape in trained for turned in (shape, shape[::-1])}
        self._constant: set[int] = set()  # arrays that follow from constants alone
        self.parts: dict[int, str] = {}
        for a, array in graph.arrays.items():
            self._label_input(a, array)
        for node in graph.nodes:
            if not all(a in self.parts for a in node.outputs):
                self._label_outputs(node)

    def _label_input(self, a: int, array: Array) -> None:
        if array.role:
            self.parts[a] = array.role if array.role in PARTS else "activations"
        if array.role == "constant":
            self._constant.add(a)

    def _label_outputs(self, node: Node) -> None:
        if node.name == "Depends":
            # each of its outputs is one of its inputs, whatever it waits for
            for a, source in zip(node.outputs, node.inputs, strict=False):
                self.parts[a] = self.parts[source]
                if source in self._constant:
                    self._constant.add(a)
        elif all(a in self._constant for a in node.inputs):
            self._constant.update(node.outputs)
            self.parts |= dict.fromkeys(node.outputs, "activations")
        else:
            sources = {self.parts[a] for a in node.inputs if a not in self._constant}
            for a in node.outputs:
                self.parts[a] = self._part(self._graph.arrays[a].shape, sources)

    def _part(self, shape: Shape, sources: set[str]) -> str:
        if sources <= {"weights", "dequantized"}:
            return "dequantized"
        # before logits: an adapter on the embedding is as long as the vocabulary, too
        if shape in self._trained:
            return "gradients"
        return "logits" if self._vocabulary in shape else "activations"


def over_time(
    usage: Usage, label: Mapping[int, str], units: Mapping[int, Unit], width: int = 1
) -> np.ndarray:
    """Return use over time, by part and by the quantity that each array's bytes are a multiple of.

    Args:
        usage: of the step.
        label: part of every array, by id.
        units: what each array is a multiple of, by id; an array that is not there counts in bytes.
        width: number of quantities.

    Returns:
        float64 ``(moments, parts, quantities)``: how many units; parts in the order of ``PARTS``.
    """
    changes = np.zeros((len(usage.steps) + 1, len(PARTS), width))
    in_flight = ROW["in_flight"]
    for moment, array, nbytes, change in usage.events:
        part = ROW[label[array]]
        unit = units.get(array, _BYTES)
        count = nbytes / unit.nbytes
        # an idle buffer moves from its part to what is in flight, and leaves that when it lands
        if change is Change.TAKEN:
            changes[moment, part, unit.quantity] += count
        elif change is not Change.LANDED:
            changes[moment, part, unit.quantity] -= count
        if change is Change.IDLE:
            changes[moment, in_flight, unit.quantity] += count
        elif change is Change.LANDED:
            changes[moment, in_flight, unit.quantity] -= count
    return np.cumsum(changes, axis=0)[:-1]
