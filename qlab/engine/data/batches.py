"""Batches by number.

Few lengths, every row once in each pass, the same batch for the same number in every process.

Knows no model.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from functools import lru_cache
from math import ceil

import numpy as np

from qlab.core.arithmetic import round_up
from qlab.core.config.train import TrainConfig
from qlab.core.train.rows import Batch, Rows, order
from qlab.errors import DataError

# distinct lengths at most: every shape is a trace, which a long epoch pays for and a short one does
# not (docs/log.md)
# the last: batches in an epoch from which on there are many
_FEW = 8
_MANY = 16
_LONG = 256
_CANDIDATES = 512  # lengths that the search looks at

Bins = list[tuple[int, ...]]


class Feed:
    """The batches of a run.

    Rows of like length share a batch. Without packing, the rows in order of length are parted into
    at most 8 groups (16 in an epoch of many batches), each padded to its longest, such that the
    least is wasted; within a group rows meet in a new order every epoch. With packing, whole rows
    are put together into long ones first.

    Args:
        rows: to train on.
        config: batch size, longest row, packing, seed.

    Attributes:
        per_epoch: batches in a pass through the rows.
        shapes: distinct ``(rows, length)`` of batches, the largest first.
        waste: tokens computed per real token.

    Raises:
        DataError: there are no rows.
    """

    def __init__(self, rows: Rows, config: TrainConfig) -> None:
        if not len(rows):
            raise DataError("There are no rows to train on.")
        self.rows = rows
        self.config = config
        lengths = rows.lengths
        bins: Bins = [(i,) for i in range(len(rows))]
        if config.pack:
            bins = _packed(
                lengths, max(config.max_seq_length, int(lengths.max())), config.batch_size
            )
        sizes = np.array([sum(int(lengths[i]) for i in members) for members in bins])
        by_size = np.argsort(sizes, kind="stable")
        self._bins = [bins[i] for i in by_size]
        most = 1 if config.pack else _MANY if len(bins) >= _LONG * config.batch_size else _FEW
        self._groups = _groups(sizes[by_size], config.batch_size, most)
        made = [(min(config.batch_size, end - i), length) for i, end, length in self._places()]
        self.per_epoch = len(made)
        self.shapes = tuple(sorted(set(made), key=lambda shape: (-shape[0] * shape[1], shape)))
        self.waste = sum(count * length for count, length in made) / rows.tokens
        self._order = lru_cache(maxsize=4)(self._shuffled)

    @property
    def iters(self) -> int:
        """Optimizer steps of the run."""
        if self.config.epochs is None:
            return self.config.iters
        return max(
            ceil(self.config.epochs * self.per_epoch / self.config.grad_accumulation_steps), 1
        )

    def batch(self, number: int) -> Batch:
        """Return batch ``number`` since the start of the run.

        Epochs follow each other, each in an order of its own.
        """
        epoch, place = divmod(number, self.per_epoch)
        members, length = self._order(epoch)[place]
        groups = [[self.rows.rows[i] for i in self._bins[m]] for m in members]
        tokens, segments = np.zeros((2, len(groups), length), np.int32)
        mask = np.zeros(tokens.shape, np.uint8)
        for b, group in enumerate(groups):
            at = 0
            for n, row in enumerate(group, 1):
                end = at + row.tokens.size
                tokens[b, at:end] = row.tokens
                mask[b, at:end] = row.mask
                segments[b, at:end] = n
                at = end
        numbers = tuple(tuple(row.number for row in group) for group in groups)
        return Batch(
            tokens, mask, segments if self.config.pack else None, numbers, int((segments > 0).sum())
        )

    def _places(self) -> list[tuple[int, int, int]]:
        """Start of each batch in the rows by length, end of its group, and its length."""
        size = self.config.batch_size
        return [
            (i, end, length) for start, end, length in self._groups for i in range(start, end, size)
        ]

    def _shuffled(self, epoch: int) -> list[tuple[list[int], int]]:
        """Members and length of each batch of an epoch."""
        seed = self.config.seed
        size = self.config.batch_size
        drawn = np.empty(len(self._bins), np.int64)
        for start, end, _ in self._groups:
            drawn[start:end] = start + order(end - start, seed, 2, epoch, start)
        batches = [
            (drawn[i : min(i + size, end)].tolist(), length) for i, end, length in self._places()
        ]
        return [batches[i] for i in order(len(batches), seed, 3, epoch)]


def part(batch: Batch, rank: int, size: int) -> Batch:
    """Return every ``size``-th row of a batch from ``rank`` on, as long as in the whole.

    ``real`` stays that of the whole.
    """
    own = slice(rank, None, size)
    segments = None if batch.segments is None else batch.segments[own]
    return Batch(batch.tokens[own], batch.mask[own], segments, batch.numbers[own], batch.real)


def _groups(sizes: np.ndarray, batch_size: int, most: int) -> list[tuple[int, int, int]]:
    """Part rows in order of length into groups that share a length, so that the least is padded.

    Exact, by dynamic programming over the lengths there are (where these are many, over some of
    them).

    Args:
        sizes: of the rows, ascending.
        batch_size: every group is a multiple of it, but for the last.
        most: groups.

    Returns:
        ``(start, end, length)`` of each group.
    """
    ends = np.append(np.arange(batch_size, len(sizes), batch_size), len(sizes))
    tops = sizes[ends - 1]
    last = np.append(np.flatnonzero(np.diff(tops)), len(tops) - 1)  # the last batch of each length
    if len(last) > _CANDIDATES:
        last = last[np.unique(np.linspace(0, len(last) - 1, _CANDIDATES).round().astype(int))]
    ends = ends[last]
    tops = tops[last]
    starts = np.append(0, ends)
    n = len(ends)
    cost = np.append(0.0, np.full(n, np.inf))
    cuts = []
    for _ in range(min(most, n)):
        # from every start to every end: rows between, padded to the longest of them
        total = (
            cost[:, None]
            + np.maximum(starts[None, :] - starts[:, None], 0) * np.append(0, tops)[None, :]
        )
        total[starts[:, None] > starts[None, :]] = np.inf
        cuts.append(total.argmin(0))
        cost = total.min(0)
    found = []
    j = n
    for cut in reversed(cuts):
        i = int(cut[j])
        if i < j:
            found.append((int(starts[i]), int(starts[j]), int(tops[j - 1])))
        j = i
    return found[::-1]


def _packed(lengths: np.ndarray, longest: int, batch_size: int) -> Bins:
    """Put whole rows together so that the fewest tokens are computed.

    Best fit decreasing finds how many long rows are needed. The rows are then spread evenly over as
    many, or over the next multiple of the batch size (which makes shorter ones, and no batch
    smaller than the others), whichever computes less.
    """
    fitted = _best_fit(lengths, longest)
    choices = [fitted]
    for count in {len(fitted), min(round_up(len(fitted), batch_size), len(lengths))}:
        even = _spread(lengths, count)
        if max(_sums(lengths, even)) <= longest:
            choices.append(even)
    return min(choices, key=lambda bins: len(bins) * max(_sums(lengths, bins)))


def _sums(lengths: np.ndarray, bins: Bins) -> list[int]:
    return [int(lengths[list(members)].sum()) for members in bins]


def _best_fit(lengths: np.ndarray, longest: int) -> Bins:
    """Longest first, each where the least room is left (best fit decreasing)."""
    bins: list[list[int]] = []
    room: dict[int, list[int]] = {}  # bins by free tokens
    free: list[int] = []  # the keys, ascending
    for i in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[i])
        k = bisect_left(free, size)
        if k == len(free):
            at = len(bins)
            left = longest - size
            bins.append([i])
        else:
            at = room[free[k]].pop()
            left = free[k] - size
            if not room[free[k]]:
                del room[free.pop(k)]
            bins[at].append(i)
        if left not in room:
            room[left] = []
            insort(free, left)
        room[left].append(at)
    return [tuple(members) for members in bins]


def _spread(lengths: np.ndarray, count: int) -> Bins:
    """Longest first, each where the fewest tokens are."""
    bins: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, at) for at in range(count)]
    for i in np.argsort(-lengths, kind="stable").tolist():
        filled, at = heap[0]
        bins[at].append(i)
        heapq.heapreplace(heap, (filled + int(lengths[i]), at))
    return [tuple(members) for members in bins]
