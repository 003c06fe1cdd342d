"""A graph is evaluated in the order in which MLX evaluates it."""

from __future__ import annotations

from qlab.core.graph.order import order
from qlab.core.graph.graph import Node
from qlab.core.graph.graph import Round
from tests.core.graph.test_graph import graph

# 0 is given; 1 and 2 follow from it, 3 from both, 4 is not asked for
NODES = [
    Node("Exp", (0,), (1,)),
    Node("Sin", (0,), (2,)),
    Node("Add", (1, 2), (3,)),
    Node("Abs", (2,), (4,)),
]


def test_what_is_needed_comes_first_and_what_is_not_asked_for_never():
    (found,) = order(graph([8] * 5, NODES, [3]))
    assert sorted(found) == [0, 1, 2] and found[-1] == 2


def test_a_later_round_does_not_evaluate_again():
    made = graph([8] * 5, NODES, [3, 4])
    made.rounds = [Round((2,)), Round((3,)), Round((4,)), Round((4,))]
    assert order(made) == [[1], [0, 2], [3], []]


def test_a_wide_graph_is_evaluated_a_part_at_a_time():
    count = 50  # each of many outputs has a chain of its own: no chain waits for all others
    nodes = [Node("Exp", (0,), (1 + i,)) for i in range(count)]
    nodes += [Node("Matmul", (1 + i, 1 + i), (1 + count + i,)) for i in range(count)]
    (found,) = order(graph([8] * (2 * count + 1), nodes, list(range(1 + count, 1 + 2 * count))))
    at = {n: i for i, n in enumerate(found)}
    assert len(found) == 2 * count and all(at[i] < at[count + i] for i in range(count))
    assert min(at[count + i] for i in range(count)) < 25
