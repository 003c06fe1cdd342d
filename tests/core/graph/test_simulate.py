"""What is in use while a graph is evaluated: donated, viewed, freed, held in flight, and handed over in rounds."""

from __future__ import annotations

from qlab.core.graph.simulate import Runahead
from qlab.core.graph.simulate import simulate
from qlab.core.graph.graph import Array
from qlab.core.graph.graph import Graph
from qlab.core.graph.graph import Node
from qlab.core.graph.graph import Round
from tests.core.graph.test_graph import graph

SIZE = 100_000  # floats: larger than what donation lets pass
BYTES = 4 * SIZE


def chain(count: int, name: str = "Matmul") -> Graph:
    """Each operation reads what the last has made."""
    nodes = [Node(name, (i,) if name != "Matmul" else (i, i), (i + 1,)) for i in range(count)]
    return graph([SIZE] * (count + 1), nodes, [count])


def test_what_is_not_read_any_more_is_free_at_once_without_run_ahead():
    assert (
        simulate(chain(10)).peak_nbytes == 3 * BYTES
    )  # the input stays; one is read while the next is made


def test_elementwise_operations_write_over_what_they_read():
    assert simulate(chain(10, "Exp")).peak_nbytes == 2 * BYTES


def test_a_buffer_that_is_kept_is_not_written_over():
    found = chain(10, "Exp")
    found.held = [5]
    assert simulate(found).peak_nbytes == 3 * BYTES


def test_views_cost_nothing():
    nodes = [
        Node("Matmul", (0, 0), (1,)),
        Node("ExpandDims", (1,), (2,)),
        Node("Squeeze", (2,), (3,)),
        Node("Abs", (3,), (4,)),
    ]
    made = graph([SIZE] * 5, nodes, [4])
    made.arrays[2] = Array((1, SIZE), 4)
    assert simulate(made).peak_nbytes == 2 * BYTES


def test_a_transposed_array_is_copied_when_it_is_reshaped():
    made = graph(
        [SIZE] * 3, [Node("Transpose", (0,), (1,), ((1, 0),)), Node("Reshape", (1,), (2,))], [2]
    )
    made.arrays |= {0: Array((100, SIZE // 100), 4), 1: Array((SIZE // 100, 100), 4)}
    assert simulate(made).peak_nbytes == 2 * BYTES


def test_buffers_are_held_until_the_device_has_caught_up():
    free, held = simulate(chain(40)), simulate(chain(40), Runahead(20))
    assert held.peak_nbytes > free.peak_nbytes
    assert simulate(chain(40), Runahead(40)).peak_nbytes > held.peak_nbytes
    # an operation is 2 dispatches: ten operations, what is read and made now, and the kept input
    assert held.peak_nbytes == (10 + 2 + 1) * BYTES


def test_on_a_gpu_only_kernels_count():
    both = [simulate(chain(60), Runahead(20, kernels)).peak_nbytes for kernels in (False, True)]
    assert both[1] > both[0]


def test_a_window_bounds_what_is_in_flight():
    made = chain(40)
    peaks = []
    for window in (1, 2, 9):
        made.rounds = [Round((a,), window) for a in (10, 20, 30, 40)]
        peaks.append(simulate(made, Runahead(10_000)).peak_nbytes)
    # the kept input, what came into the oldest round, and what the rounds in flight make
    assert peaks == [12 * BYTES, 22 * BYTES, 41 * BYTES]


def test_every_byte_is_accounted_for():
    usage = simulate(chain(25), Runahead(20))
    assert usage.timeline[0] == 2 * BYTES and (usage.timeline >= BYTES).all()
    assert len(usage.timeline) == 25


def test_an_operation_with_several_outputs_writes_over_nothing():
    # each output holds on to the inputs, so none is the only one that needs them
    one, two = (
        graph([SIZE] * 4, [Node("Exp", (0,), (1,)), Node("Compiled", (1,), o)], list(o))
        for o in ((2,), (2, 3))
    )
    two.arrays[3] = Array((SIZE,), 4)
    del one.arrays[3]
    assert simulate(one).peak_nbytes == 2 * BYTES
    assert simulate(two).peak_nbytes == 4 * BYTES


def test_what_an_update_writes_into_is_copied_first_unless_it_may_be_written_over():
    chained = graph(
        [SIZE] * 5, [Node("SliceUpdate", (0, 1), (2,)), Node("SliceUpdate", (2, 1), (3,))], [3]
    )
    del chained.arrays[4]
    assert simulate(chained).peak_nbytes == 3 * BYTES


def test_a_function_of_a_broadcast_array_is_as_small_as_what_was_broadcast():
    made = graph([SIZE] * 3, [Node("Broadcast", (0,), (1,)), Node("AsType", (1,), (2,))], [2])
    made.arrays |= {1: Array((10, SIZE), 4), 2: Array((10, SIZE), 4)}
    assert simulate(made).peak_nbytes == 2 * BYTES


def test_a_product_that_is_added_writes_over_what_it_is_added_to_except_on_a_gpu():
    # c is made anew, then a · b is added to it
    made = graph([SIZE] * 5, [Node("Exp", (0,), (1,)), Node("AddMM", (2, 3, 1), (4,))], [4])
    assert simulate(made).peak_nbytes == 4 * BYTES
    assert simulate(made, Runahead(0, kernels=True)).peak_nbytes == 5 * BYTES
