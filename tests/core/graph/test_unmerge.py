"""What reading has merged is taken apart again as MLX really builds it."""

from __future__ import annotations

from qlab.core.graph.graph import Array
from qlab.core.graph.graph import Node
from qlab.core.graph.unmerge import unmerged
from tests.core.graph.test_graph import graph


def names(found) -> list[str]:
    return [node.name for node in found.nodes]


def test_in_the_forward_pass_every_operation_has_its_own_broadcast_and_its_gradient_reads_the_same():
    # 0 → broadcast 1, read by two operations (3, 5); loss 6; the gradient of the first (7) reads the broadcast, too
    nodes = [
        Node("Broadcast", (0,), (1,)),
        Node("Add", (2, 1), (3,)),
        Node("Add", (4, 1), (5,)),
        Node("Add", (3, 5), (6,)),
        Node("Multiply", (6, 1), (7,)),
    ]
    made = graph([1] + [8] * 7, nodes, [6, 7])
    forward, gradient = unmerged(made, 6), unmerged(made, 6).nodes[-1]
    assert names(forward).count("Broadcast") == 2 and gradient.inputs == (6, 1)
    assert (
        names(unmerged(made)).count("Broadcast") == 3
    )  # without a backward pass everything is a forward pass


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


def test_in_the_forward_pass_every_product_flattens_for_itself():
    # x 0 is flattened → 1, multiplied by 2 → 3 and by 4 → 5; loss 6; the gradient of the first (7) reads what was flattened
    nodes = [
        Node("Flatten", (0,), (1,)),
        Node("Matmul", (1, 2), (3,)),
        Node("Matmul", (1, 4), (5,)),
        Node("Add", (3, 5), (6,)),
        Node("Matmul", (1, 6), (7,)),
    ]
    found = unmerged(graph([8] * 8, nodes, [6, 7]), 6)
    assert names(found).count("Flatten") == 2 and found.nodes[-1].inputs == (1, 6)


def test_what_is_taken_apart_makes_the_same_arrays():
    nodes = [
        Node("Broadcast", (0,), (1,)),
        Node("Add", (2, 1), (3,)),
        Node("Add", (4, 1), (5,)),
        Node("Add", (3, 5), (6,)),
    ]
    made = graph([1] + [8] * 6, nodes, [6])
    found = unmerged(made, 6)
    assert {a: found.arrays[a] for a in made.arrays} == made.arrays and len(made.nodes) == len(
        nodes
    )
    assert all(array == Array((8,), 4) for a, array in found.arrays.items() if a not in made.arrays)
