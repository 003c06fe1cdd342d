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

from dataclasses import dataclass
from itertools import product
from math import prod
from typing import NamedTuple

import numpy as np

from qlab.core.graph.graph import Array, Graph, Shape
from qlab.core.graph.parts import INPUTS, PARTS, ROW, Unit, labels, over_time
from qlab.core.graph.products import RANK, TRAINED, Exponents, all_products, product_by_shape, terms
from qlab.core.graph.simulate import Runahead, Usage, simulate
from qlab.core.graph.sizes import Reference, sizes

PHASES = ("forward", "loss", "backward", "backward", "update")
"""Of a step; the backward pass in two halves."""

_DRAIN = 110  # operations after which what the loss left behind has landed
_SETTLED = 0.005  # share of the activations that may still live when the backward pass is over
_BACK_SHARE = (0.85, 1)  # between which a block's part of the backward peak is believed
_TYPICAL = sizes(batch=4, length=513, rank=16, chunk=512)  # where moments are compared
# sizes at which a moment must be the highest to be kept
_BATCHES = (1, 4, 32)
_LENGTHS = (17, 65, 257, 513, 1025, 2049, 8193)
_RANKS = (2, 16, 256)
_LOSS_CHUNKS = (64, 512)
_GRID = [sizes(*point) for point in product(_BATCHES, _LENGTHS, _RANKS, _LOSS_CHUNKS)]


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
        of_products = terms(values, self.products)
        peak = np.zeros(len(PARTS))
        peak_phase = ""
        highest = -1.0
        for phase, name in enumerate(PHASES):
            # (moments, parts, products) · (products,) → (moments, parts)
            use = self.phases[phase] @ of_products
            use = use + self._of_further_blocks(phase, of_products, blocks)
            totals = use.sum(1)
            at = int(totals.argmax())
            # summed anew: the sum of a row alone may round otherwise
            total = float(use[at].sum())
            if total > highest:
                highest = total
                peak = use[at]
                peak_phase = name
        nbytes = np.maximum(peak, 0).tolist()
        parts = dict(zip(PARTS, nbytes, strict=True))
        return Peak(peak_phase, parts)

    def _of_further_blocks(
        self, phase: int, of_products: np.ndarray, blocks: tuple[int, ...]
    ) -> np.ndarray | int:
        """Bytes of every part that blocks beyond those of the reading add, ``(parts,)``."""
        more: np.ndarray | int = 0
        kinds = zip(self.blocks, blocks, self.slopes, strict=True)
        for read, count, slopes in kinds:
            of_one = slopes[phase] @ of_products
            more = more + (count - read) * of_one
        return more


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
        every = all_products()
        product_of = product_by_shape(sample.pair, sample.references, every)
        # of all products only those that occur; the first is 1
        rank = every.index(RANK)
        used = sorted({0, rank, *product_of.values()})
        self._products = [every[p] for p in used]
        reference = sample.references[0]
        values = terms(reference.sizes, self._products)
        self._units = {}
        for shape, p in product_of.items():
            place = used.index(p)
            self._units[shape] = Unit(place, values[place])
        place = used.index(rank)
        self._rank = Unit(place, float(reference.rank))

    def formula(self) -> Formula:
        whole = self._moments(self._sample.pair[0])
        cuts = _cuts(whole)
        starts = (0, *cuts)
        ends = (*cuts, len(whole.table))
        points = [terms(point, self._products) for point in _GRID]
        grid = np.array(points).T
        phases = []
        for start, end in zip(starts, ends, strict=True):
            moments = whole.table[start:end]
            phases.append(_highest_somewhere(moments, grid))
        slopes = [self._slopes(whole, cuts, graph) for graph in self._sample.fewer]
        products = tuple(self._products)
        return Formula(products, tuple(phases), tuple(slopes), self._sample.blocks)

    def _moments(self, graph: Graph) -> _Moments:
        """Simulate a graph and count what is in use, in products of quantities."""
        label = labels(graph, self._sample.vocabulary, self._sample.trained)
        usage = simulate(graph, self._runahead)
        units = {a: self._unit(array) for a, array in graph.arrays.items()}
        table = over_time(usage, label, units, len(self._products))
        exact_rows = [ROW[part] for part in INPUTS]  # without a formula
        table[:, exact_rows] = 0
        made_logits = self._logits_moments(graph, label, usage)
        return _Moments(table, made_logits[0], made_logits[-1])

    def _unit(self, array: Array) -> Unit:
        # a vector of the parameters of fewer blocks has a shape of its own
        other = Unit(0, 1.0)
        if array.role in TRAINED:
            other = self._rank
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
        logits = set()
        for a, part in label.items():
            shape = shapes[a]
            if part != "logits" or shape in dequantized:
                continue
            if shape[-1] == vocabulary and prod(shape) > vocabulary:
                logits.add(a)
        moments = []
        for moment, n in enumerate(usage.steps):
            node = graph.nodes[n]
            if not logits.isdisjoint(node.outputs):
                moments.append(moment)
        return moments

    def _slopes(self, whole: _Moments, cuts: _Cuts, fewer: Graph | None) -> tuple[np.ndarray, ...]:
        """What one more block of a kind adds to each phase: ``(parts, products)`` each.

        Args:
            whole: the step with all blocks that were read.
            cuts: its phases.
            fewer: the step with one block of the kind less; None if the model has no more of them.
        """
        if fewer is None:
            nothing = np.zeros(whole.table.shape[1:])
            return (nothing,) * len(PHASES)
        less = self._moments(fewer)
        typical = terms(_TYPICAL, self._products)
        checkpoint = _needed(whole.table[cuts.loss] - less.table[less.first])
        most = _most_gradients(whole.table, typical)
        most_of_less = _most_gradients(less.table, typical)
        update = _needed(most - most_of_less)
        settled = _settled(less.table)
        late = _needed(whole.table[cuts.update] - less.table[settled])
        # the same phase of the shorter step: as long after its loss, to the middle of what is left
        start = less.last + cuts.backward - whole.last
        end = (start + len(less.table)) // 2
        early_backward = whole.table[cuts.backward : cuts.late_backward]
        highest = _highest(early_backward, typical)
        highest_of_less = _highest(less.table[start:end], typical)
        backward = _needed(highest - highest_of_less)
        # some of what the loss found there is gone when the backward pass is at its peak; anything
        # else is a chance of the order
        of_backward = (backward @ typical).sum()
        of_checkpoint = (checkpoint @ typical).sum()
        share = of_backward / max(of_checkpoint, 1)
        is_believable = _BACK_SHARE[0] < share < _BACK_SHARE[1]
        early = backward if is_believable else checkpoint
        return checkpoint, checkpoint, early, late, update


def _cuts(moments: _Moments) -> _Cuts:
    """Cut a step into its phases; none is empty."""
    settled = _settled(moments.table)
    update = max(settled, moments.first + 3)
    drained = moments.last + _DRAIN
    end = len(moments.table)
    backward = min(drained, end - 2, update - 2)
    late_backward = (backward + update) // 2
    return _Cuts(moments.first, backward, late_backward, update)


def _needed(use: np.ndarray) -> np.ndarray:
    """Leave out what is only in flight; ``(parts, products)``."""
    needed = use.copy()
    needed[ROW["in_flight"]] = 0
    return needed


def _settled(table: np.ndarray) -> int:
    """Moment from which (nearly) no activation is needed any more; the batch stays."""
    activations = table[:, ROW["activations"], 1:]  # (moments, products but the first)
    live = activations.sum(1)
    limit = live[-1] + _SETTLED * live.max()
    above = np.flatnonzero(live > limit)
    last = int(above.max(initial=0))
    return min(last + 1, len(table) - 1)


def _highest(table: np.ndarray, of_products: np.ndarray) -> np.ndarray:
    """The moment of the most that is needed, at typical sizes; ``(parts, products)``."""
    needed = np.delete(table, ROW["in_flight"], axis=1)
    totals = (needed @ of_products).sum(1)
    return table[totals.argmax()]


def _most_gradients(table: np.ndarray, of_products: np.ndarray) -> np.ndarray:
    """The moment of the most gradients and what the update makes of them; ``(parts, products)``."""
    gradients = table[:, ROW["gradients"]] @ of_products
    return table[gradients.argmax()]


def _highest_somewhere(table: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Moments of a phase that are the highest at some sizes.

    Args:
        table: ``(moments, parts, products)``.
        grid: value of every product at sizes, ``(products, points)``.
    """
    totals = table.sum(1) @ grid  # (moments, points)
    highest = totals.argmax(0)
    return table[np.unique(highest)]
