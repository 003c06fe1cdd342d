"""Batches by number: few lengths, every row once in each pass, the same in every process.

The training loop asks a ``Feed`` for batch 0, 1, 2, … and may begin anywhere, so that a resumed run
sees the batches that it would have seen. numpy only.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from functools import lru_cache
from math import ceil
from typing import NamedTuple

import numpy as np

from qlab.core.arithmetic import round_up
from qlab.core.config.train import TrainConfig
from qlab.core.train.rows import Batch, Row, Rows, order
from qlab.errors import DataError

# Most distinct lengths of batches: every shape is compiled anew, which a long epoch pays for and a
# short one does not (docs/log.md).
_FEW_LENGTHS = 8
_MANY_LENGTHS = 16
_LONG_EPOCH = 256  # batches from which an epoch may have many lengths
_CANDIDATES = 512  # lengths that the search for the best groups looks at

# streams of random numbers drawn from the run's seed (1 splits off the rows held out)
_ORDER_IN_GROUP = 2
_ORDER_OF_BATCHES = 3

Bins = list[tuple[int, ...]]  # numbers of the rows that share a row of a batch


class Span(NamedTuple):
    """Consecutive bins, in order of length, that are padded to one length: a group, or a batch.

    Attributes:
        start: first bin.
        end: bin after the last.
        length: tokens to which they are padded.
    """

    start: int
    end: int
    length: int


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
        rows: to train on.
        config: the run's.
        per_epoch: batches in a pass through the rows.
        shapes: distinct ``(rows, length)`` of batches, the largest first.
        waste: tokens computed per real token.

    Raises:
        DataError: there are no rows.

    Example:
        >>> feed = Feed(rows, TrainConfig(batch_size=4))
        >>> feed.batch(0).tokens.shape == feed.batch(0).shape
        True
    """

    def __init__(self, rows: Rows, config: TrainConfig) -> None:
        if not len(rows):
            raise DataError("There are no rows to train on.")
        self.rows = rows
        self.config = config
        bins = self._all_bins()
        sizes = np.array([sum(int(rows.lengths[i]) for i in members) for members in bins])
        by_size = np.argsort(sizes, kind="stable")
        self._bins = [bins[i] for i in by_size]
        self._groups = _groups(sizes[by_size], config.batch_size, self._most_lengths())
        self._places = self._all_places()
        shapes = [(place.end - place.start, place.length) for place in self._places]
        self.per_epoch = len(shapes)
        self.shapes = tuple(sorted(set(shapes), key=_largest_first))
        self.waste = sum(count * length for count, length in shapes) / rows.tokens
        self._order = lru_cache(maxsize=4)(self._shuffled)

    def _all_bins(self) -> Bins:
        """Rows that share a row of a batch: each alone, unless rows are packed."""
        lengths = self.rows.lengths
        if not self.config.pack:
            return [(i,) for i in range(len(self.rows))]
        longest = max(self.config.max_seq_length, int(lengths.max()))
        return _packed(lengths, longest, self.config.batch_size)

    def _most_lengths(self) -> int:
        """Distinct lengths of batches at most; packed rows are nearly equal."""
        if self.config.pack:
            return 1
        is_long = len(self._bins) >= _LONG_EPOCH * self.config.batch_size
        return _MANY_LENGTHS if is_long else _FEW_LENGTHS

    def _all_places(self) -> list[Span]:
        """Batches of an epoch; the last of a group may be smaller."""
        size = self.config.batch_size
        return [
            Span(start, min(start + size, group.end), group.length)
            for group in self._groups
            for start in range(group.start, group.end, size)
        ]

    @property
    def iters(self) -> int:
        """Optimizer steps of the run."""
        config = self.config
        if config.epochs is None:
            return config.iters
        steps = config.epochs * self.per_epoch / config.grad_accumulation_steps
        return max(ceil(steps), 1)

    def batch(self, number: int) -> Batch:
        """Return batch ``number`` since the start of the run.

        Epochs follow each other, each in an order of its own.
        """
        epoch, place = divmod(number, self.per_epoch)
        members, length = self._order(epoch)[place]
        groups = [[self.rows.rows[i] for i in self._bins[member]] for member in members]
        return _padded(groups, length, packed=self.config.pack)

    def _shuffled(self, epoch: int) -> list[tuple[list[int], int]]:
        """Members (bins) and length of each batch of an epoch."""
        seed = self.config.seed
        drawn = np.empty(len(self._bins), np.int64)
        for start, end, _ in self._groups:
            drawn[start:end] = start + order(end - start, seed, _ORDER_IN_GROUP, epoch, start)
        batches = [(drawn[start:end].tolist(), length) for start, end, length in self._places]
        return [batches[i] for i in order(len(batches), seed, _ORDER_OF_BATCHES, epoch)]


def _largest_first(shape: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    rows, length = shape
    return -rows * length, shape


def _padded(groups: list[list[Row]], length: int, packed: bool) -> Batch:
    """Put rows into arrays ``(B, L)``.

    Args:
        groups: rows that share a row of the batch, for each of its B rows.
        length: L.
        packed: whether to say which token belongs to which row.
    """
    shape = (len(groups), length)
    tokens = np.zeros(shape, np.int32)
    mask = np.zeros(shape, np.uint8)
    segments = np.zeros(shape, np.int32)
    for b, group in enumerate(groups):
        start = 0
        for segment, row in enumerate(group, 1):
            end = start + row.tokens.size
            tokens[b, start:end] = row.tokens
            mask[b, start:end] = row.mask
            segments[b, start:end] = segment
            start = end
    return Batch(
        tokens=tokens,
        mask=mask,
        segments=segments if packed else None,
        numbers=tuple(tuple(row.number for row in group) for group in groups),
        real=int((segments > 0).sum()),
    )


def part(batch: Batch, rank: int, size: int) -> Batch:
    """Return every ``size``-th row of a batch from ``rank`` on, as long as in the whole.

    ``real`` stays that of the whole, since the loop counts a step's tokens once for all processes.
    """
    share = slice(rank, None, size)
    return Batch(
        tokens=batch.tokens[share],
        mask=batch.mask[share],
        segments=None if batch.segments is None else batch.segments[share],
        numbers=batch.numbers[share],
        real=batch.real,
    )


def _groups(sizes: np.ndarray, batch_size: int, most: int) -> list[Span]:
    """Part rows in order of length into groups that share a length, so that the least is padded.

    Exact, by dynamic programming over the lengths there are (where these are many, over some of
    them): the cheapest way to part the rows up to an end into k groups is a cheapest way to part
    those up to some start into k − 1, and one group from there.

    Args:
        sizes: of the rows, ascending.
        batch_size: every group is a multiple of it, but for the last.
        most: groups.
    """
    ends, lengths = _candidates(sizes, batch_size)
    starts = np.append(0, ends)  # (n + 1,)
    n = len(ends)
    cost = np.append(0.0, np.full(n, np.inf))  # tokens up to each start, with no group yet
    cuts = []
    for _ in range(min(most, n)):
        # (from every start, to every end): rows between, padded to the longest of them
        rows = np.maximum(starts[None, :] - starts[:, None], 0)
        total = cost[:, None] + rows * np.append(0, lengths)[None, :]
        total[starts[:, None] > starts[None, :]] = np.inf
        cuts.append(total.argmin(0))
        cost = total.min(0)
    groups = []
    j = n
    for cut in reversed(cuts):
        i = int(cut[j])
        if i < j:  # else this group is empty: fewer were enough
            groups.append(Span(int(starts[i]), int(starts[j]), int(lengths[j - 1])))
        j = i
    return groups[::-1]


def _candidates(sizes: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows after which a group may end, and the length that it then has."""
    ends = np.append(np.arange(batch_size, len(sizes), batch_size), len(sizes))
    lengths = sizes[ends - 1]
    # only the last batch of each length: to end within a length never pays
    last = np.append(np.flatnonzero(np.diff(lengths)), len(lengths) - 1)
    if len(last) > _CANDIDATES:
        spread = np.linspace(0, len(last) - 1, _CANDIDATES)
        last = last[np.unique(spread.round().astype(int))]
    return ends[last], lengths[last]


def _packed(lengths: np.ndarray, longest: int, batch_size: int) -> Bins:
    """Put whole rows together so that the fewest tokens are computed.

    Best fit decreasing says how many long rows are needed. The rows are then spread evenly over as
    many, or over the next multiple of the batch size (which makes shorter ones, and no batch
    smaller than the others), whichever computes less.
    """
    fitted = _best_fit(lengths, longest)
    choices = [fitted]
    whole_batches = min(round_up(len(fitted), batch_size), len(lengths))
    for count in {len(fitted), whole_batches}:
        even = _spread(lengths, count)
        if max(_sums(lengths, even)) <= longest:
            choices.append(even)
    return min(choices, key=lambda bins: len(bins) * max(_sums(lengths, bins)))


def _sums(lengths: np.ndarray, bins: Bins) -> list[int]:
    return [int(lengths[list(members)].sum()) for members in bins]


def _best_fit(lengths: np.ndarray, longest: int) -> Bins:
    """Longest first, each where the least room is left (best fit decreasing)."""
    bins: list[list[int]] = []
    bins_with_room: dict[int, list[int]] = {}  # bins by their free tokens
    rooms: list[int] = []  # the keys, ascending
    for i in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[i])
        k = bisect_left(rooms, size)
        if k == len(rooms):  # fits nowhere
            bin_number = len(bins)
            room = longest
            bins.append([i])
        else:
            room = rooms[k]
            bin_number = bins_with_room[room].pop()
            if not bins_with_room[room]:
                del bins_with_room[rooms.pop(k)]
            bins[bin_number].append(i)
        left = room - size
        if left not in bins_with_room:
            bins_with_room[left] = []
            insort(rooms, left)
        bins_with_room[left].append(bin_number)
    return [tuple(members) for members in bins]


def _spread(lengths: np.ndarray, count: int) -> Bins:
    """Longest first, each where the fewest tokens are."""
    bins: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, number) for number in range(count)]
    for i in np.argsort(-lengths, kind="stable").tolist():
        filled, number = heap[0]
        bins[number].append(i)
        heapq.heapreplace(heap, (filled + int(lengths[i]), number))
    return [tuple(members) for members in bins]
