"""Functions with custom gradients are put where their stand-ins are in a graph."""

from __future__ import annotations

from qlab.core.graph.graph import Array, Graph, Node
from qlab.core.graph.handwritten import AXES, FIRST, Halves, handwritten
from tests.core.graph.test_graph import graph
from tests.core.graph.test_unmerge import names

# forward: x 0 → Exp 1; backward: slope 0, x 1 → Cos 2
FORWARD = graph([8, 8], [Node("Exp", (0,), (1,))], [1])
BACKWARD = graph([8, 8, 8], [Node("Cos", (0, 1), (2,))], [2])
ROWS = (8,)
ONE = (1,) * AXES


def marked(call: int, array: int) -> tuple[int, ...]:
    return (call + FIRST, array + FIRST) + (1,) * (AXES - 2)


def stand_in(calls: int = 1, gradient: bool = True) -> Graph:
    """Log of each call of a function of x, and its gradient, as they are read with stand-ins."""
    made = Graph()

    def add(name: str, inputs: list[int], shape: tuple[int, ...]) -> int:
        output = made.add(Array(shape, 4))
        made.nodes.append(Node(name, tuple(inputs), (output,)))
        return output

    x = made.add(Array(ROWS, 4, "batch"))
    made.inputs = [x]
    for call in range(calls):
        spread = add("Broadcast", [add("Reduce", [x], ONE)], marked(call, 0))
        turned = add("Transpose", [spread], marked(call, 0)[::-1])
        square = add("Square", [add("Reduce", [turned], ONE)], ONE)
        value = add("Reshape", [square], ROWS)
        made.outputs.append(add("Log", [value], ROWS))
        if gradient:
            slope = add("Divide", [value], ROWS)
            back = add("Multiply", [add("Reduce", [slope], ONE), square], marked(call, 0)[::-1])
            turned = add("Transpose", [back], marked(call, 0))
            made.outputs.append(add("Reshape", [add("Reduce", [turned], ONE)], ROWS))
    return made


def test_both_halves_stand_where_the_function_was():
    found = handwritten(stand_in(), [Halves(FORWARD, BACKWARD, 1)])
    assert names(found) == ["Exp", "StopGradient", "CustomTransforms", "Log", "Divide", "Cos"]
    forward, stopped, held, log, slope, backward = found.nodes
    assert forward.inputs == (found.inputs[0],)
    # MLX holds on to what the function was given until its gradient is made
    assert held.inputs == (found.inputs[0], stopped.outputs[0])
    assert log.inputs == slope.inputs == held.outputs
    assert backward.inputs == (slope.outputs[0], found.inputs[0])
    assert found.outputs == [log.outputs[0], backward.outputs[0]]


def test_no_array_of_a_stand_in_is_left():
    found = handwritten(stand_in(2), [Halves(FORWARD, BACKWARD, 1)] * 2)
    assert names(found).count("Exp") == names(found).count("Cos") == 2
    assert all(len(array.shape) < AXES for array in found.arrays.values())


def test_a_half_that_nothing_needs_is_left_out():
    found = handwritten(stand_in(gradient=False), [Halves(FORWARD, BACKWARD, 1)])
    assert "Exp" in names(found) and "Cos" not in names(found)
