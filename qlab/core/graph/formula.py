"""Peak memory as arithmetic: a step of a few blocks, read twice, with its sizes left open.

Which arrays exist at a moment does not depend on how large they are. So two graphs of the same step
at different sizes (``references``) tell each array's bytes as a multiple of one product of
quantities, such as batch · tokens²: the product whose value grows by the ratio by which the array
has grown. Then

1. every moment of the simulated step becomes a row of coefficients, one for each part and product;
2. only moments that are the highest at some sizes are kept (``_highest_somewhere``);
3. what one more block adds is the difference to a step with one block less, phase by phase.

``Formula.parts`` is then a few products of small matrices. ``Forecast`` makes formulas and asks
them. Knows no framework.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations_with_replacement, product
from math import prod
from typing import NamedTuple

import numpy as np

from qlab.core.graph.graph import Array, Graph, Shape
from qlab.core.graph.parts import INPUTS, PARTS, ROW, Unit, labels, over_time
from qlab.core.graph.simulate import Runahead, Usage, simulate
from qlab.core.graph.sizes import QUANTITIES, Reference, sizes
from qlab.errors import UnsupportedError

Exponents = tuple[int, ...]
"""Of a product: the power of each of ``QUANTITIES``."""

PHASES = ("forward", "loss", "backward", "backward", "update")
"""Of a step; the backward pass in two halves."""

_DEGREE = 4  # of a product: no array has more axes that grow
_RANK: Exponents = tuple(int(name == "rank") for name in QUANTITIES)
# roles of what grows with the rank; nearly so where all trained arrays are one vector, some of
# whose numbers (DoRA's lengths) do not
_TRAINED = ("adapter", "optimizer", "gradients")
_DRAIN = 110  # operations after which what the loss left behind has landed
_SETTLED = 0.005  # share of the activations that may still live when the backward pass is over
_BACK_SHARE = (0.85, 1)  # between which a block's part of the backward peak is believed
_TYPICAL = sizes(batch=4, length=513, rank=16, chunk=512)  # where moments are compared
# sizes at which a moment must be the highest to be kept
_GRID = [
    sizes(*point)
    for point in product(
        (1, 4, 32),  # batch
        (17, 65, 257, 513, 1025, 2049, 8193),  # length
        (2, 16, 256),  # rank
        (64, 512),  # chunk
    )
]


class Peak(NamedTuple):
    """The highest moment of a step.

    Attributes:
        phase: one of ``PHASES``.
        parts: bytes of every part then, without the inputs.
    """

    phase: str
    parts: dict[str, float]


@dataclass(frozen=True, eq=False)
class Formula:
    """Peak memory of a kind of step, for every batch, length, rank and number of blocks.

    Attributes:
        products: exponents of the quantities, one row a product.
        phases: for each of ``PHASES``, moments that may be its peak: float64 ``(moments, parts,
            products)``, in bytes, without the inputs.
        slopes: for each kind of block, what one more of it adds to each phase: float64 ``(parts,
            products)``.
        blocks: blocks of each kind in the step that was read.
    """

    products: tuple[Exponents, ...]
    phases: tuple[np.ndarray, ...]
    slopes: tuple[tuple[np.ndarray, ...], ...]
    blocks: tuple[int, ...]

    def parts(self, values: tuple[int, ...], blocks: tuple[int, ...]) -> Peak:
        """Return the phase of the peak and the bytes of every part then, without the inputs.

        Args:
            values: what ``sizes`` returns.
            blocks: of each kind, from the first that gets an adapter to the last.
        """
        terms = _terms(values, self.products)
        peak = np.zeros(len(PARTS))
        peak_phase = ""
        highest = -1.0
        for phase, name in enumerate(PHASES):
            # (moments, parts, products) · (products,) → (moments, parts)
            use = self.phases[phase] @ terms + self._of_further_blocks(phase, terms, blocks)
            at = int(use.sum(1).argmax())
            if use[at].sum() > highest:
                highest = float(use[at].sum())
                peak = use[at]
                peak_phase = name
        nbytes = np.maximum(peak, 0).tolist()
        return Peak(peak_phase, dict(zip(PARTS, nbytes, strict=True)))

    def _of_further_blocks(
        self, phase: int, terms: np.ndarray, blocks: tuple[int, ...]
    ) -> np.ndarray | int:
        """Bytes of every part that blocks beyond those of the reading add, ``(parts,)``."""
        more = [
            (count - read) * (slopes[phase] @ terms)
            for read, count, slopes in zip(self.blocks, blocks, self.slopes, strict=True)
        ]
        return sum(more)


@dataclass(frozen=True, eq=False, kw_only=True)
class Sample:
    """A step of few blocks, read.

    Attributes:
        pair: its graph at the two references.
        fewer: for each kind of block, its graph with one block less of that kind, at the first
            reference; None if the model has no more of them.
        references: the sizes.
        blocks: of each kind.
        vocabulary: length of a row of logits.
        trained: shapes of the trained arrays at the first reference.
    """

    pair: tuple[Graph, Graph]
    fewer: tuple[Graph | None, ...]
    references: tuple[Reference, Reference]
    blocks: tuple[int, ...]
    vocabulary: int
    trained: tuple[Shape, ...]


def formula(sample: Sample, runahead: Runahead) -> Formula:
    """Return the formula of a kind of step.

    Args:
        sample: the step with few blocks.
        runahead: of the back end.

    Raises:
        UnsupportedError: the graphs are not of one structure.
    """
    return _Fitting(sample, runahead).formula()


class _Moments(NamedTuple):
    """A simulated step, moment by moment.

    Attributes:
        table: float64 ``(moments, parts, products)``, in bytes, without the inputs.
        first: the first moment at which logits are made.
        last: the last one.
    """

    table: np.ndarray
    first: int
    last: int


class _Cuts(NamedTuple):
    """Where the phases of a step begin, as moments.

    Attributes:
        loss: its first logits.
        backward: what the loss left behind has landed.
        late_backward: its second half.
        update: the activations are gone.
    """

    loss: int
    backward: int
    late_backward: int
    update: int


class _Fitting:
    """Turns a sample into a formula."""

    def __init__(self, sample: Sample, runahead: Runahead) -> None:
        self._sample = sample
        self._runahead = runahead
        every = _products()
        product_of = _product_by_shape(sample, every)
        # of all products only those that occur; the first is 1
        used = sorted({0, every.index(_RANK), *product_of.values()})
        self._products = [every[p] for p in used]
        values = _terms(sample.references[0].sizes, self._products)
        self._units = {}
        for shape, p in product_of.items():
            place = used.index(p)
            self._units[shape] = Unit(place, values[place])
        place = used.index(every.index(_RANK))
        self._rank = Unit(place, float(sample.references[0].rank))

    def formula(self) -> Formula:
        whole = self._moments(self._sample.pair[0])
        cuts = _cuts(whole)
        edges = (0, *cuts, len(whole.table))
        grid = np.array([_terms(point, self._products) for point in _GRID]).T
        phases = tuple(
            _highest_somewhere(whole.table[start:end], grid)
            for start, end in zip(edges, edges[1:], strict=False)
        )
        slopes = tuple(self._slopes(whole, cuts, graph) for graph in self._sample.fewer)
        return Formula(tuple(self._products), phases, slopes, self._sample.blocks)

    def _moments(self, graph: Graph) -> _Moments:
        """Simulate a graph and count what is in use, in products of quantities."""
        label = labels(graph, self._sample.vocabulary, self._sample.trained)
        usage = simulate(graph, self._runahead)
        units = {a: self._unit(array) for a, array in graph.arrays.items()}
        table = over_time(usage, label, units, len(self._products))
        table[:, [ROW[part] for part in INPUTS]] = 0  # exact without a formula
        made_logits = self._logits_moments(graph, label, usage)
        return _Moments(table, made_logits[0], made_logits[-1])

    def _unit(self, array: Array) -> Unit:
        # a vector of the parameters of fewer blocks has a shape of its own
        other = self._rank if array.role in _TRAINED else Unit(0, 1.0)
        return self._units.get(array.shape, other)

    def _logits_moments(self, graph: Graph, label: dict[int, str], usage: Usage) -> list[int]:
        """Moments at which logits are made.

        An adapted embedding has arrays as long as the vocabulary that are no logits: its
        dequantized weight, and a length for each row.
        """
        shapes = {a: array.shape for a, array in graph.arrays.items()}
        dequantized = {shapes[a] for a, part in label.items() if part == "dequantized"}
        dequantized |= {shape[::-1] for shape in dequantized}
        vocabulary = self._sample.vocabulary
        logits = {
            a
            for a, part in label.items()
            if part == "logits"
            and shapes[a][-1] == vocabulary
            and prod(shapes[a]) > vocabulary
            and shapes[a] not in dequantized
        }
        return [
            moment
            for moment, n in enumerate(usage.steps)
            if logits.intersection(graph.nodes[n].outputs)
        ]

    def _slopes(self, whole: _Moments, cuts: _Cuts, fewer: Graph | None) -> tuple[np.ndarray, ...]:
        """What one more block of a kind adds to each phase: ``(parts, products)`` each.

        Args:
            whole: the step with all blocks that were read.
            cuts: its phases.
            fewer: the step with one block of the kind less; None if the model has no more of them.
        """
        if fewer is None:
            return (np.zeros(whole.table.shape[1:]),) * len(PHASES)
        less = self._moments(fewer)
        typical = _terms(_TYPICAL, self._products)
        checkpoint = _needed(whole.table[cuts.loss] - less.table[less.first])
        update = _needed(
            _most_gradients(whole.table, typical) - _most_gradients(less.table, typical)
        )
        late = _needed(whole.table[cuts.update] - less.table[_settled(less.table)])
        # the same phase of the shorter step: as long after its loss, to the middle of what is left
        start = less.last + cuts.backward - whole.last
        end = (start + len(less.table)) // 2
        backward = _needed(
            _highest(whole.table[cuts.backward : cuts.late_backward], typical)
            - _highest(less.table[start:end], typical)
        )
        # some of what the loss found there is gone when the backward pass is at its peak; anything
        # else is a chance of the order
        share = (backward @ typical).sum() / max((checkpoint @ typical).sum(), 1)
        is_believable = _BACK_SHARE[0] < share < _BACK_SHARE[1]
        early = backward if is_believable else checkpoint
        return checkpoint, checkpoint, early, late, update


def _cuts(moments: _Moments) -> _Cuts:
    """Cut a step into its phases; none is empty."""
    update = max(_settled(moments.table), moments.first + 3)
    backward = min(moments.last + _DRAIN, len(moments.table) - 2, update - 2)
    return _Cuts(moments.first, backward, (backward + update) // 2, update)


def _terms(values: tuple[int, ...], products: Sequence[Exponents]) -> np.ndarray:
    """Value of every product of quantities, float64 ``(products,)``."""
    return np.array([float(_value(values, exponents)) for exponents in products])


def _value(values: tuple[int, ...], exponents: Exponents) -> int:
    return prod(value**power for value, power in zip(values, exponents, strict=True))


def _needed(use: np.ndarray) -> np.ndarray:
    """Leave out what is only in flight; ``(parts, products)``."""
    needed = use.copy()
    needed[ROW["in_flight"]] = 0
    return needed


def _settled(table: np.ndarray) -> int:
    """Moment from which (nearly) no activation is needed any more; the batch stays."""
    live = table[:, ROW["activations"], 1:].sum(1)
    is_above = live > live[-1] + _SETTLED * live.max()
    last = int(np.flatnonzero(is_above).max(initial=0))
    return min(last + 1, len(table) - 1)


def _highest(table: np.ndarray, terms: np.ndarray) -> np.ndarray:
    """The moment of the most that is needed, at typical sizes; ``(parts, products)``."""
    needed = np.delete(table, ROW["in_flight"], axis=1)
    return table[(needed @ terms).sum(1).argmax()]


def _most_gradients(table: np.ndarray, terms: np.ndarray) -> np.ndarray:
    """The moment of the most gradients and what the update makes of them; ``(parts, products)``."""
    return table[(table[:, ROW["gradients"]] @ terms).argmax()]


def _highest_somewhere(table: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Moments of a phase that are the highest at some sizes.

    Args:
        table: ``(moments, parts, products)``.
        grid: value of every product at sizes, ``(products, points)``.
    """
    return table[np.unique((table.sum(1) @ grid).argmax(0))]


def _products() -> list[Exponents]:
    """Every product of quantities up to a degree; the first is 1."""
    count = len(QUANTITIES)
    factors = [
        chosen
        for degree in range(_DEGREE + 1)
        for chosen in combinations_with_replacement(range(count), degree)
    ]
    return [tuple(chosen.count(i) for i in range(count)) for chosen in factors]


def _product_by_shape(sample: Sample, products: list[Exponents]) -> dict[Shape, int]:
    """Return which product the size of each shape is a multiple of.

    Returns:
        Index of the product by the shape at the first reference.

    Raises:
        UnsupportedError: the two graphs are not of one structure.
    """
    one, two = sample.pair
    operations = [[node.name for node in graph.nodes] for graph in sample.pair]
    if operations[0] != operations[1] or one.arrays.keys() != two.arrays.keys():
        raise UnsupportedError("The step of this model changes its structure with its sizes.")
    first, second = (reference.sizes for reference in sample.references)
    # the first of several products that grow alike
    by_growth: dict[Fraction, int] = {}
    for i, exponents in enumerate(products):
        growth = Fraction(_value(second, exponents), _value(first, exponents))
        by_growth.setdefault(growth, i)
    logs = np.log([float(growth) for growth in by_growth])
    indices = list(by_growth.values())
    rank = products.index(_RANK)

    by_shape: dict[Shape, int] = {}
    for a, array in one.arrays.items():
        if array.shape in by_shape:
            continue
        growth = Fraction(two.arrays[a].size, array.size) if array.size else Fraction(1)
        if growth in by_growth:
            by_shape[array.shape] = by_growth[growth]
        elif array.role in _TRAINED:
            by_shape[array.shape] = rank
        else:
            distance = np.abs(logs - np.log(float(growth)))
            by_shape[array.shape] = indices[int(distance.argmin())]
    return by_shape
