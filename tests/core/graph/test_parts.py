"""The parts of an estimate sum to what is in use at every moment."""

from __future__ import annotations

import numpy as np

from qlab.core.graph.simulate import Runahead
from qlab.core.graph.simulate import simulate
from qlab.core.graph.graph import Node
from qlab.core.graph.parts import PARTS
from qlab.core.graph.parts import labels
from qlab.core.graph.parts import over_time
from tests.core.graph.test_graph import graph

# packed 0 → dense 1; x 2 · dense → logits 3 (7 long); a 4 · x → gradient 5 (5 long)
NODES = [Node("Dequantize", (0,), (1,)), Node("Matmul", (2, 1), (3,)), Node("Matmul", (4, 2), (5,))]
MADE = graph([3, 64, 9, 7, 5, 5], NODES, [3, 5], {0: "weights", 2: "batch", 4: "adapter"})


def test_arrays_belong_to_the_part_that_they_are_needed_for():
    found = labels(MADE, 7, [(5,)])
    assert found == {
        0: "weights",
        1: "dequantized",
        2: "activations",
        3: "logits",
        4: "adapter",
        5: "gradients",
    }


def test_parts_sum_to_use_at_every_moment():
    for ahead in (None, Runahead(4), Runahead(110)):
        usage = simulate(MADE, ahead)
        parts = over_time(usage, labels(MADE, 7, [(5,)]), {})
        assert parts.shape == (3, len(PARTS), 1)
        np.testing.assert_array_equal(parts.sum((1, 2)), usage.timeline)
        assert (parts >= 0).all()
