"""Functions with a gradient of their own are put back into graphs that were read without them."""

from __future__ import annotations

import pytest

from qlab.core.graph import Array, Node
from qlab.core.handwritten import MARK, handwritten
from tests.core.test_graph import graph
from tests.core.test_unmerge import names

# weight 0 → dense 1; x 2 · A 3 → 5; 5 · B 4 → 6; x · dense + 6 → 7; its slope 8; slope · B → 9; 9 · A → 10; slope · dense → 11;
# both added → 12
ADAPTED = [
    Node("AsType", (0,), (1,)), Node("Matmul", (2, 3), (5,)), Node("Matmul", (5, 4), (6,)), Node("AddMM", (2, 1, 6), (7,)),
    Node("Exp", (7,), (8,)), Node("Matmul", (8, 4), (9,)), Node("Matmul", (9, 3), (10,)), Node("Matmul", (8, 1), (11,)),
    Node("Add", (11, 10), (12,)),
]  # fmt: skip


def adapted(thin: int = 2):
    made = graph([8] * 13, ADAPTED, [7, 12], {0: "weights"})
    made.inputs = [0, 2, 3, 4]
    for inner in (5, 9):
        made.arrays[inner] = Array((1, thin), 4)
    return made


@pytest.mark.parametrize("thin", [2, 8, 9])
def test_gradients_by_the_input_of_an_adapted_product_are_added_within_the_product_of_the_weight(thin):
    found = handwritten(adapted(thin))
    assert names(found) == [
        "AsType", "Matmul", "Matmul", "AddMM", "StopGradient", "CustomTransforms", "Exp", "Matmul", "Matmul", "AddMM",
    ]  # fmt: skip
    forward, behind, back = found.nodes[3], found.nodes[5], found.nodes[-1]
    assert behind.inputs[0] == forward.inputs[0] and found.outputs == [behind.outputs[0], back.outputs[0]]
    assert back.inputs == (found.nodes[6].outputs[0], found.nodes[0].outputs[0], found.nodes[8].outputs[0])
    assert len(found.arrays) == 4 + sum(len(node.outputs) for node in found.nodes)  # none that nobody makes


def test_a_sum_of_other_things_stays_a_sum():
    for other in (Node("Exp", (0,), (3,)), Node("Matmul", (1, 1), (3,))):
        nodes = [Node("Matmul", (0, 1), (2,)), other, Node("Add", (2, 3), (4,))]
        made = graph([8] * 5, nodes, [4])
        made.inputs = [0, 1]
        assert names(handwritten(made)) == ["Matmul", other.name, "Add"]


# gate 0, x 1 and slope 2; each as a marked array (3, 4, 5); 3 · 4 → 6 → h 7; 5 · 4 → 8 → by the gate 9; 5 · 3 → 10 → by x 11
GATED = [
    Node("Reshape", (0,), (3,)), Node("Reshape", (1,), (4,)), Node("Multiply", (3, 4), (6,)), Node("Reshape", (6,), (7,)),
    Node("Reshape", (2,), (5,)), Node("Multiply", (5, 4), (8,)), Node("Reshape", (8,), (9,)), Node("Multiply", (5, 3), (10,)),
    Node("Reshape", (10,), (11,)),
]  # fmt: skip


def test_a_gated_activation_reads_the_gate_twice_on_the_way_back():
    made = graph([8] * 12, GATED, [7, 9, 11])
    for a in (3, 4, 5, 6, 8, 10):
        made.arrays[a] = Array((1,) * (MARK - 1) + (8,), 4)
    found = handwritten(made)
    assert names(found) == ["Multiply", "StopGradient", "CustomTransforms", "Depends", "Select", "Depends", "Multiply"]
    forward, _, behind, one, by_gate, two, by_x = found.nodes
    gate, x, slope = found.inputs
    assert forward.inputs == (gate, x) and behind.inputs[:2] == (gate, x)
    assert one.inputs == (gate, slope) and by_gate.inputs == (*one.outputs, x, slope)
    assert two.inputs == (gate, slope, x) and by_x.inputs == (*two.outputs, slope)
    assert found.outputs == [behind.outputs[0], by_gate.outputs[0], by_x.outputs[0]]
    assert all(len(array.shape) < MARK for array in found.arrays.values())
