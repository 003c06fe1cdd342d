"""A formula that was read at two sizes tells what a simulation of other sizes and depths gives."""

from __future__ import annotations

import pytest

from qlab.core.graph.formula import Sample, formula
from qlab.core.graph.graph import Array, Graph, Node
from qlab.core.graph.parts import INPUTS
from qlab.core.graph.simulate import Runahead, simulate
from qlab.core.graph.sizes import Reference, references, sizes
from qlab.errors import UnsupportedError

VOCABULARY = 97
WIDTH = 16
AHEAD = Runahead(0)


def step(sizes: Reference, blocks: int = 3) -> Graph:
    """A step of blocks that keep one activation each, a loss, and gradients of the adapters."""
    graph = Graph()
    rows = (sizes.batch, sizes.tokens, WIDTH)

    def add(name: str, inputs: list[int], shape: tuple[int, ...]) -> int:
        output = graph.add(Array(shape, 4))
        graph.nodes.append(Node(name, tuple(inputs), (output,)))
        return output

    x = graph.add(Array(rows, 4, "batch"))
    adapters = [graph.add(Array((WIDTH, sizes.rank), 4, "adapter")) for _ in range(blocks)]
    graph.inputs = [x, *adapters]
    activations = [x]
    for adapter in adapters:
        activations.append(add("Matmul", [activations[-1], adapter], rows))
    logits = add("Matmul", [activations[-1]], (*rows[:2], VOCABULARY))
    loss = add("Reduce", [logits], (1,))
    slope = add("Matmul", [logits, loss], rows)
    gradients = []
    for activation, adapter in zip(activations[-2::-1], adapters[::-1], strict=True):
        gradients.append(add("Matmul", [activation, slope], (WIDTH, sizes.rank)))
        slope = add("Matmul", [slope, adapter], rows)
        graph.hand_over([gradients[-1], slope], window=1)
    new = []
    for gradient, adapter in zip(gradients, adapters[::-1], strict=True):
        new.append(add("Matmul", [gradient, adapter], (WIDTH, sizes.rank)))
    graph.outputs = [*new, loss]
    graph.hand_over(graph.outputs, window=1)
    return graph


def sample(pair: tuple[Graph, Graph], refs: tuple[Reference, Reference]) -> Sample:
    return Sample(
        pair=pair,
        fewer=(step(refs[0], 2),),
        references=refs,
        blocks=(3,),
        vocabulary=VOCABULARY,
        trained=((WIDTH, refs[0].rank),),
    )


@pytest.mark.parametrize("blocks", [3, 4, 11])
@pytest.mark.parametrize(("batch", "tokens", "rank"), [(3, 113, 5), (1, 64, 8), (6, 900, 4)])
def test_it_gives_the_peak_of_other_sizes_and_depths(batch, tokens, rank, blocks):
    refs = references(0)
    made = formula(sample((step(refs[0]), step(refs[1])), refs), AHEAD)
    peak = made.parts(sizes(batch, tokens + 1, rank, 0), (blocks,))
    assert not any(peak.parts[name] for name in INPUTS)  # exact without a formula

    graph = step(Reference(batch, tokens, rank, 0), blocks)
    whole = simulate(graph, AHEAD).peak_nbytes
    adapters = sum(array.nbytes for array in graph.arrays.values() if array.role == "adapter")
    assert sum(peak.parts.values()) == pytest.approx(whole - adapters, rel=0.01)
    assert peak.phase == "loss"


def test_a_step_that_changes_with_its_sizes_has_none():
    refs = references(0)
    with pytest.raises(UnsupportedError, match="changes its structure"):
        formula(sample((step(refs[0], 3), step(refs[1], 4)), refs), AHEAD)
