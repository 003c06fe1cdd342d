"""Peak memory as arithmetic: a step of a few blocks, traced twice, with its sizes left open.

Which arrays exist at a moment does not depend on how large they are. So two traces of the same step
at different sizes tell each array's bytes as a multiple of a product such as ``batch · tokens²``,
and every moment becomes a row of coefficients; what each further block adds is the difference
between a step of some blocks and one of one less. Knows no framework.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations_with_replacement, product
from math import ceil, prod

import numpy as np

from qlab.core.graph.graph import Graph
from qlab.core.graph.parts import INPUTS, PARTS, labels, over_time
from qlab.core.graph.simulate import Runahead, simulate
from qlab.errors import UnsupportedError

QUANTITIES = ("batch", "tokens", "length", "rank", "chunk", "rest")
"""rows; positions of a row with a target; positions of a row; rank; positions in a chunk of the loss; in its last chunk."""

CHUNKS = 4  # a loss in more chunks than this needs what one in this many needs
# batch, tokens, rank of the two traces: their ratios must tell products apart, and no number be a
# size of something else
_SIZES = ((3, 113, 5), (5, 239, 7))
_IN_TILES = (
    (4, 384, 5),
    (7, 640, 6),
)  # the same where only tokens in tiles of 128 are computed as most tokens are
_DRAIN = 110  # operations after which what the loss left behind has landed
_DEGREE = 4
_RANK = tuple(int(name == "rank") for name in QUANTITIES)
_TRAINED = (
    "adapter",
    "optimizer",
    "gradients",
)  # roles of what grows with the rank, nearly so where all of it is one vector
# sizes at which a moment must win to be kept
_GRID = ((1, 4, 32), (17, 65, 257, 513, 1025, 2049, 8193), (2, 16, 256), (64, 512))


@dataclass(frozen=True)
class Reference:
    """Sizes at which a step is traced."""

    batch: int
    tokens: int
    rank: int
    chunk: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """In the order of ``QUANTITIES``."""
        return sizes(self.batch, self.tokens + 1, self.rank, self.chunk)


def references(chunks: int, widest: int = 7, tiles: bool = False) -> tuple[Reference, Reference]:
    """Return the sizes of the two traces of a step.

    Args:
        chunks: in how many the loss is made; 0 is at once.
        widest: the largest rank that is legal.
        tiles: whether tokens are computed in tiles.
    """
    made = []
    chosen = _IN_TILES if tiles else _SIZES
    for (batch, tokens, rank), share, most in zip(
        chosen, (0.4, 0.9), (max(widest - 1, 1), widest), strict=True
    ):
        rank = min(rank, most)
        chunk = (
            ceil(batch * tokens / (chunks - 1 + share)) if chunks > 1 else chunks * batch * tokens
        )
        made.append(Reference(batch, tokens, rank, chunk))
    return made[0], made[1]


def chunks(batch: int, length: int, chunk: int) -> int:
    """Return in how many chunks a loss is made, counted up to ``CHUNKS``."""
    return min(ceil(batch * (length - 1) / chunk), CHUNKS) if chunk else 1


def sizes(batch: int, length: int, rank: int, chunk: int) -> tuple[int, ...]:
    """Return the value of every quantity, in the order of ``QUANTITIES``."""
    every = batch * (length - 1)
    whole = not chunk or chunk >= every
    return (
        batch,
        length - 1,
        length,
        rank,
        1 if whole else chunk,
        1 if whole else (every - 1) % chunk + 1,
    )


@dataclass(frozen=True, eq=False)
class Formula:
    """Peak memory of a kind of step, for every batch, length, rank and number of blocks.

    Attributes:
        products: exponents of the quantities, one row a product.
        phases: for each of ``PHASES`` of the step (the way back in two halves), moments that may be
            its peak: float64 ``(moments, parts, products)``, in bytes, without the inputs.
        slopes: for each kind of block, what one more of it adds to each phase: float64 ``(parts,
            products)``.
        blocks: blocks of each kind in the step that was traced.
    """

    products: tuple[tuple[int, ...], ...]
    phases: tuple[np.ndarray, ...]
    slopes: tuple[tuple[np.ndarray, ...], ...]
    blocks: tuple[int, ...]

    def parts(
        self, values: tuple[int, ...], blocks: tuple[int, ...]
    ) -> tuple[str, dict[str, float]]:
        """Return the phase of the peak and the bytes of every part then, without the inputs.

        Args:
            values: what ``sizes`` returns.
            blocks: of each kind, from the first that gets an adapter to the last.
        """
        terms = _terms(values, self.products)
        best: tuple[float, str, np.ndarray] = (-1.0, "", np.zeros(len(PARTS)))
        for i, (name, rows) in enumerate(zip(PHASES, self.phases, strict=True)):
            more = sum(
                (b - a) * (kind[i] @ terms)
                for a, b, kind in zip(self.blocks, blocks, self.slopes, strict=True)
            )
            use = rows @ terms + more
            at = int(use.sum(1).argmax())
            if use[at].sum() > best[0]:
                best = (float(use[at].sum()), name, use[at])
        return best[1], dict(zip(PARTS, np.maximum(best[2], 0).tolist(), strict=True))


PHASES = ("forward", "loss", "backward", "backward", "update")


@dataclass(frozen=True, eq=False)
class Sample:
    """A step of few blocks, to be read.

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
    trained: tuple[tuple[int, ...], ...]


def formula(sample: Sample, runahead: Runahead) -> Formula:
    """Return the formula of a kind of step.

    Args:
        sample: the step with few blocks.
        runahead: of the back end.

    Raises:
        UnsupportedError: the graphs are not of one structure.
    """
    products = _products()
    shapes = _match(sample, products)
    used = sorted({0, products.index(_RANK), *shapes.values()})
    values = _terms(sample.references[0].sizes, [products[p] for p in used])
    units = {shape: (used.index(p), values[used.index(p)]) for shape, p in shapes.items()}
    rank = (used.index(products.index(_RANK)), float(sample.references[0].rank))

    def moments(graph: Graph) -> tuple[np.ndarray, int, int]:
        label = labels(graph, sample.vocabulary, sample.trained)
        usage = simulate(graph, runahead)
        other = {
            role: rank for role in _TRAINED
        }  # a vector of the parameters of fewer blocks has a shape of its own
        own = {
            a: units.get(array.shape, other.get(array.role, (0, 1.0)))
            for a, array in graph.arrays.items()
        }
        table = over_time(usage, label, own, len(used))
        table[:, [i for i, part in enumerate(PARTS) if part in INPUTS]] = 0
        shape = {a: array.shape for a, array in graph.arrays.items()}
        # an adapted embedding has arrays as long as the vocabulary that are no logits: its values,
        # and a length for each row
        dense = {
            s
            for a, part in label.items()
            if part == "dequantized"
            for s in (shape[a], shape[a][::-1])
        }
        rows = {
            a for a, part in label.items() if part == "logits" and shape[a][-1] == sample.vocabulary
        }
        found = {a for a in rows if prod(shape[a]) > sample.vocabulary and shape[a] not in dense}
        logits = [
            i for i, n in enumerate(usage.steps) if found.intersection(graph.nodes[n].outputs)
        ]
        return table, logits[0], logits[-1]

    table, first, last = moments(sample.pair[0])
    typical = _terms(sizes(4, 513, 16, 512), [products[p] for p in used])
    done = max(_settled(table), first + 3)
    drained = min(last + _DRAIN, len(table) - 2, done - 2)  # no phase is empty
    half = (drained + done) // 2
    cuts = ((0, first), (first, drained), (drained, half), (half, done), (done, len(table)))
    points = [sizes(*point) for point in product(*_GRID)]
    grid = np.array([_terms(point, [products[p] for p in used]) for point in points]).T
    phases = tuple(_winners(table[a:b], grid) for a, b in cuts)
    slopes = []
    for graph in sample.fewer:
        if graph is None:
            slopes.append((np.zeros(table.shape[1:]),) * len(PHASES))
            continue
        less, start, stop = moments(graph)
        kept = _needed(table[first] - less[start])
        end = _needed(_updating(table, typical) - _updating(less, typical))
        late = _needed(table[done] - less[_settled(less)])
        shorter = stop + drained - last
        back = _needed(
            _highest(table[drained:half], typical)
            - _highest(less[shorter : (shorter + len(less)) // 2], typical)
        )
        # some of what the loss found there is gone when the way back is at its peak; anything else
        # is a chance of the order
        share = (back @ typical).sum() / max((kept @ typical).sum(), 1)
        slopes.append((kept, kept, back if 0.85 < share < 1 else kept, late, end))
    return Formula(tuple(products[p] for p in used), phases, tuple(slopes), sample.blocks)


def _terms(values: tuple[int, ...], products: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Value of every product of quantities, float64."""
    return np.array(
        [prod(v**e for v, e in zip(values, row, strict=True)) for row in products], float
    )


def _needed(use: np.ndarray) -> np.ndarray:
    """Leave out what is only in flight."""
    made = use.copy()
    made[list(PARTS).index("in_flight")] = 0
    return made


def _settled(table: np.ndarray) -> int:
    """The moment from which (nearly) no activation is needed any more; the batch stays."""
    live = table[:, list(PARTS).index("activations"), 1:].sum(1)
    return min(
        int(np.flatnonzero(live > live[-1] + 0.005 * live.max()).max(initial=0)) + 1, len(table) - 1
    )


def _highest(table: np.ndarray, terms: np.ndarray) -> np.ndarray:
    """The moment of the most that is needed, at typical sizes."""
    needed = np.delete(table, list(PARTS).index("in_flight"), axis=1)
    return table[(needed @ terms).sum(1).argmax()]


def _updating(table: np.ndarray, terms: np.ndarray) -> np.ndarray:
    """The moment of the most gradients and what the update makes of them, at typical sizes."""
    return table[(table[:, list(PARTS).index("gradients")] @ terms).argmax()]


def _products() -> list[tuple[int, ...]]:
    """Exponents of every product of quantities up to a degree; the first is 1."""
    count = len(QUANTITIES)
    picks = [
        p
        for degree in range(_DEGREE + 1)
        for p in combinations_with_replacement(range(count), degree)
    ]
    return [tuple(p.count(i) for i in range(count)) for p in picks]


def _match(sample: Sample, products: list[tuple[int, ...]]) -> dict[tuple[int, ...], int]:
    """Return the index of the product that the size of each shape is a multiple of."""
    one, two = sample.pair
    if [n.name for n in one.nodes] != [
        n.name for n in two.nodes
    ] or one.arrays.keys() != two.arrays.keys():
        raise UnsupportedError("The step of this model changes its structure with its sizes.")
    ratio: dict[Fraction, int] = {}
    for i, row in enumerate(products):
        up = Fraction(
            *(
                prod(v**e for v, e in zip(ref.sizes, row, strict=True))
                for ref in reversed(sample.references)
            )
        )
        ratio.setdefault(up, i)
    logs = np.log([float(r) for r in ratio])
    found: dict[tuple[int, ...], int] = {}
    for a, array in one.arrays.items():
        if array.shape not in found:
            up = Fraction(two.arrays[a].size, array.size) if array.size else Fraction(1)
            nearest = (
                products.index(_RANK)
                if array.role in _TRAINED
                else list(ratio.values())[_nearest(logs, up)]
            )
            found[array.shape] = ratio.get(up, nearest)
    return found


def _nearest(logs: np.ndarray, ratio: Fraction) -> int:
    return int(np.abs(logs - np.log(float(ratio))).argmin())


def _winners(rows: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Keep the moments that are the highest anywhere on a grid of sizes, ``(products, points)``."""
    return rows[np.unique((rows.sum(1) @ grid).argmax(0))]
