"""Batches by number: few lengths, every row once in each pass, the same batch for the same number in every process.

Knows no model.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil

import numpy as np

from qlab.core.rows import Batch, Rows
from qlab.core.training import TrainConfig
from qlab.errors import DataError

_LENGTHS = 8  # distinct lengths at most: every shape is a trace
_GRAIN = 8  # lengths are multiples of this


class Feed:
    """The batches of a run.

    Args:
        rows: to train on.
        config: batch size, longest row, packing, seed.

    Attributes:
        per_epoch: batches in a pass through the rows.

    Raises:
        DataError: there are no rows.
    """

    def __init__(self, rows: Rows, config: TrainConfig) -> None:
        if not len(rows):
            raise DataError("There are no rows to train on.")
        self.rows, self.config = rows, config
        longest = config.max_seq_length
        self._bins = _packed(rows, longest) if config.pack else [(i,) for i in range(len(rows))]
        self._sizes = np.array([sum(rows.rows[i].tokens.size for i in members) for members in self._bins])
        self._lengths = _few_lengths(self._sizes, longest)
        self.per_epoch = -(-len(self._bins) // config.batch_size)
        self._order = lru_cache(maxsize=4)(self._shuffled)

    def batch(self, number: int) -> Batch:
        """Return batch ``number`` since the start of the run; epochs follow each other, each in an order of its own."""
        epoch, place = divmod(number, self.per_epoch)
        return self._made([self._bins[i] for i in self._order(epoch)[place]])

    @property
    def iters(self) -> int:
        """Optimizer steps of the run."""
        if self.config.epochs is None:
            return self.config.iters
        return max(ceil(self.config.epochs * self.per_epoch / self.config.grad_accumulation_steps), 1)

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Distinct ``(rows, length)`` of a pass."""
        return tuple(sorted({self._shape(members) for members in self._order(0)}))

    @property
    def waste(self) -> float:
        """Computed tokens by real tokens in a pass."""
        made = [self._shape(members) for members in self._order(0)]
        return sum(rows * length for rows, length in made) / int(self._sizes.sum())

    def _shape(self, members: tuple[int, ...]) -> tuple[int, int]:
        longest = int(self._sizes[list(members)].max())
        return len(members), int(self._lengths[np.searchsorted(self._lengths, longest)])

    def _shuffled(self, epoch: int) -> list[tuple[int, ...]]:
        """Rows of like length together, ties and batches in an order drawn for this epoch."""
        draw = np.random.default_rng((self.config.seed, 2, epoch))
        shuffled = draw.permutation(len(self._bins))
        by_length = shuffled[np.argsort(self._sizes[shuffled], kind="stable")]
        size = self.config.batch_size
        batches = [tuple(by_length[i : i + size].tolist()) for i in range(0, len(by_length), size)]
        return [batches[i] for i in draw.permutation(len(batches))]

    def _made(self, bins: list[tuple[int, ...]]) -> Batch:
        groups = [[self.rows.rows[i] for i in members] for members in bins]
        longest = max(sum(row.tokens.size for row in group) for group in groups)
        length = int(self._lengths[np.searchsorted(self._lengths, longest)])
        tokens, segments = np.zeros((2, len(groups), length), np.int32)
        mask = np.zeros(tokens.shape, np.uint8)
        for b, group in enumerate(groups):
            at = 0
            for n, row in enumerate(group):
                end = at + row.tokens.size
                tokens[b, at:end], mask[b, at:end], segments[b, at:end] = row.tokens, row.mask, n + 1
                mask[b, at] = 0
                at = end
        numbers = tuple(tuple(row.number for row in group) for group in groups)
        return Batch(tokens, mask, segments if self.config.pack else None, numbers, int((segments > 0).sum()))


def _packed(rows: Rows, longest: int) -> list[tuple[int, ...]]:
    """Put whole rows together, longest first, each where the least room is left (best fit decreasing)."""
    room: list[list[int]] = [[] for _ in range(longest + 1)]  # bins by free tokens
    bins: list[list[int]] = []
    for i in np.argsort(-rows.lengths, kind="stable").tolist():
        size = int(rows.lengths[i])
        free = next((f for f in range(size, longest + 1) if room[f]), None)
        if free is None:
            bins.append([])
            at, free = len(bins) - 1, longest
        else:
            at = room[free].pop()
        bins[at].append(i)
        room[free - size].append(at)
    return [tuple(members) for members in bins]


def _few_lengths(sizes: np.ndarray, longest: int) -> np.ndarray:
    """Choose a few lengths to pad to, so that the least is wasted: exact, by dynamic programming over the lengths there are."""
    rounded = np.minimum(-(-sizes // _GRAIN) * _GRAIN, max(longest, int(sizes.max())))
    values, counts = np.unique(rounded, return_counts=True)
    if len(values) <= _LENGTHS:
        return values
    if len(values) > 128:  # a coarser grain keeps the search short
        step = -(-len(values) // 128)
        keep = np.unique(np.append(values[step - 1 :: step], values[-1]))
        counts = np.bincount(np.searchsorted(keep, values), counts).astype(int)
        values = keep
    cumulative = np.concatenate([[0], np.cumsum(counts)])
    n = len(values)
    cost = np.full((_LENGTHS + 1, n + 1), np.inf)
    cost[0, 0], cut = 0, np.zeros((_LENGTHS + 1, n + 1), int)
    for k in range(1, _LENGTHS + 1):
        for j in range(1, n + 1):
            total = cost[k - 1, :j] + (cumulative[j] - cumulative[:j]) * values[j - 1]
            cut[k, j] = int(total.argmin())
            cost[k, j] = total[cut[k, j]]
    chosen, j = [], n
    for k in range(_LENGTHS, 0, -1):
        if j:
            chosen.append(values[j - 1])
            j = cut[k, j]
    return np.array(sorted(set(chosen)))
