"""What reading has merged is taken apart again as MLX really builds it."""

from __future__ import annotations

from qlab.core.graph import Array, Node
from qlab.core.unmerge import unmerged
from tests.core.test_graph import graph

# weight 0 → dense 1; x 2 · dense → y 3; loss 4; slope 5 follows from it, and is multiplied by the dense weight → 6
PRODUCT = [Node("AsType", (0,), (1,)), Node("Matmul", (2, 1), (3,)), Node("Exp", (3,), (4,)), Node("Exp", (4,), (5,)),
           Node("Matmul", (5, 1), (6,))]  # fmt: skip


def names(found) -> list[str]:
    return [node.name for node in found.nodes]


def test_a_weight_is_made_again_when_the_slope_is_there():
    found = unmerged(graph([8] * 7, PRODUCT, [4, 6], {0: "weights"}), 4)
    assert names(found) == ["AsType", "Matmul", "Exp", "Exp", "Depends", "AsType", "Matmul"]
    tie, again, product = found.nodes[4:]
    assert tie.inputs == (0, 5) and again.inputs == tie.outputs and product.inputs == (5, again.outputs[0])


def test_a_weight_that_is_stored_as_it_is_needed_is_not_made_again():
    nodes = [Node("Matmul", (1, 0), (2,)), Node("Exp", (2,), (3,)), Node("Matmul", (3, 0), (4,))]
    assert names(unmerged(graph([8] * 5, nodes, [2, 4], {0: "weights"}), 2)) == names(graph([8] * 5, nodes, []))


def test_on_the_way_forward_every_operation_has_its_own_broadcast_and_its_gradient_reads_the_same():
    # 0 → broadcast 1, read by two operations (3, 5); loss 6; the gradient of the first (7) reads the broadcast, too
    nodes = [Node("Broadcast", (0,), (1,)), Node("Add", (2, 1), (3,)), Node("Add", (4, 1), (5,)), Node("Add", (3, 5), (6,)),
             Node("Multiply", (6, 1), (7,))]  # fmt: skip
    made = graph([1] + [8] * 7, nodes, [6, 7])
    forward, gradient = unmerged(made, 6), unmerged(made, 6).nodes[-1]
    assert names(forward).count("Broadcast") == 2 and gradient.inputs == (6, 1)
    assert names(unmerged(made)).count("Broadcast") == 3  # without a way back everything is a way forward


def test_numbers_that_follow_from_numbers_are_computed_by_every_reader():
    nodes = [
        Node("Power", (0, 1), (2,)),
        Node("Sqrt", (2,), (3,)),
        Node("Multiply", (4, 3), (5,)),
        Node("Multiply", (5, 3), (6,)),
    ]
    made = graph([1, 1, 1, 1, 8, 8, 8], nodes, [6])
    assert names(unmerged(made)).count("Power") == 2
    made.outputs = [6, 3]  # what is asked for is kept, and shared
    assert names(unmerged(made)).count("Sqrt") == 1


def test_a_product_of_a_made_weight_flattens_for_itself_and_stands_behind_a_function_of_its_own():
    # weight 0 → 1; x 2 is flattened → 3, multiplied by it → 4 and by an adapter 5 → 6; the first is shaped again → 7
    nodes = [Node("AsType", (0,), (1,)), Node("Flatten", (2,), (3,)), Node("Matmul", (3, 1), (4,)), Node("Matmul", (3, 5), (6,)),
             Node("Unflatten", (4,), (7,))]  # fmt: skip
    found = unmerged(graph([8] * 8, nodes, [7, 6], {0: "weights"}))
    assert names(found).count("Flatten") == 2
    assert names(found)[-3:] == ["Unflatten", "StopGradient", "CustomTransforms"]
    assert found.nodes[-1].inputs[0] == 2 and found.nodes[-1].outputs == (7,)


def test_what_is_taken_apart_makes_the_same_arrays():
    made = graph([8] * 7, PRODUCT, [4, 6], {0: "weights"})
    found = unmerged(made, 4)
    assert {a: found.arrays[a] for a in made.arrays} == made.arrays and len(made.nodes) == len(PRODUCT)
    assert all(array == Array((8,), 4) for a, array in found.arrays.items() if a not in made.arrays)


# weight 0 → dense 1; x 2 · A 3 → 5; 5 · B 4 → 6; x · dense + 6 → 7; its slope 8
ADAPTED = [
    Node("AsType", (0,), (1,)), Node("Matmul", (2, 3), (5,)), Node("Matmul", (5, 4), (6,)), Node("AddMM", (2, 1, 6), (7,)),
    Node("Exp", (7,), (8,)),
]  # fmt: skip


def test_an_adapted_product_makes_its_weight_again_on_the_way_back_and_so_what_its_adapter_made_of_the_input():
    nodes = [*ADAPTED, Node("Transpose", (5,), (9,)), Node("Matmul", (9, 8), (10,)), Node("AddMM", (8, 1, 11), (12,))]
    made = graph([8] * 13, nodes, [7, 10, 12], {0: "weights"})
    found = unmerged(made, 7)
    assert names(found).count("AsType") == 2
    again = next(node for node in found.nodes if node.name == "Transpose").inputs[0]
    assert again != 5 and found.nodes[[n.outputs[0] for n in found.nodes].index(again)].inputs == (2, 3)
