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

Bin = tuple[int, ...]  # numbers of the rows that share a row of a batch
Bins = list[Bin]
Shape = tuple[int, int]
Arrays = tuple[np.ndarray, np.ndarray]


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

    @property
    def shape(self) -> Shape:
        """Bins, and the tokens of each."""
        return self.end - self.start, self.length


class _Members(NamedTuple):
    """The bins of a batch, and the tokens to which they are padded."""

    bins: list[int]
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
        sizes = np.array(_sums(rows.lengths, bins))
        by_size = np.argsort(sizes, kind="stable")
        self._bins = [bins[i] for i in by_size]
        most = self._most_lengths()
        self._groups = _groups(sizes[by_size], config.batch_size, most)
        self._places = self._all_places()
        shapes = [place.shape for place in self._places]
        distinct = sorted(set(shapes), key=_largest_first)
        computed = sum(count * length for count, length in shapes)
        self.per_epoch = len(shapes)
        self.shapes = tuple(distinct)
        self.waste = computed / rows.tokens
        self._order = lru_cache(maxsize=4)(self._shuffled)

    def _all_bins(self) -> Bins:
        """Rows that share a row of a batch: each alone, unless rows are packed."""
        lengths = self.rows.lengths
        if not self.config.pack:
            return [(i,) for i in range(len(self.rows))]
        longest_row = int(lengths.max())
        longest = max(self.config.max_seq_length, longest_row)
        return _packed(lengths, longest, self.config.batch_size)

    def _most_lengths(self) -> int:
        """Distinct lengths of batches at most; packed rows are nearly equal."""
        if self.config.pack:
            return 1
        long_epoch = _LONG_EPOCH * self.config.batch_size
        is_long = len(self._bins) >= long_epoch
        return _MANY_LENGTHS if is_long else _FEW_LENGTHS

    def _all_places(self) -> list[Span]:
        """Batches of an epoch; the last of a group may be smaller."""
        size = self.config.batch_size
        places = []
        for group in self._groups:
            for start in range(group.start, group.end, size):
                end = min(start + size, group.end)
                place = Span(start, end, group.length)
                places.append(place)
        return places

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
        members = self._order(epoch)[place]
        groups = [self._rows_of(i) for i in members.bins]
        return _padded(groups, members.length, packed=self.config.pack)

    def _rows_of(self, number: int) -> list[Row]:
        """Rows that share a bin."""
        return [self.rows.rows[i] for i in self._bins[number]]

    def _shuffled(self, epoch: int) -> list[_Members]:
        """Members and length of each batch of an epoch."""
        seed = self.config.seed
        drawn = np.empty(len(self._bins), np.int64)
        for start, end, _ in self._groups:
            within = order(end - start, seed, _ORDER_IN_GROUP, epoch, start)
            drawn[start:end] = start + within
        batches = []
        for start, end, length in self._places:
            bins = drawn[start:end].tolist()
            batches.append(_Members(bins, length))
        shuffled = order(len(batches), seed, _ORDER_OF_BATCHES, epoch)
        return [batches[i] for i in shuffled]


def _largest_first(shape: Shape) -> tuple[int, Shape]:
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
    is_real = segments > 0
    return Batch(
        tokens=tokens,
        mask=mask,
        segments=segments if packed else None,
        numbers=tuple(_numbers(group) for group in groups),
        real=int(is_real.sum()),
    )


def _numbers(group: list[Row]) -> tuple[int, ...]:
    return tuple(row.number for row in group)


def part(batch: Batch, rank: int, size: int) -> Batch:
    """Return every ``size``-th row of a batch from ``rank`` on, as long as in the whole.

    ``real`` stays that of the whole, since the loop counts a step's tokens once for all processes.
    """
    share = slice(rank, None, size)
    segments = batch.segments
    if segments is not None:
        segments = segments[share]
    return Batch(
        tokens=batch.tokens[share],
        mask=batch.mask[share],
        segments=segments,
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
    unreachable = np.full(n, np.inf)
    cost = np.append(0.0, unreachable)  # tokens up to each start, with no group yet
    # (from every start, to every end)
    start = starts[:, None]
    end = starts[None, :]
    longest = np.append(0, lengths)[None, :]
    rows = np.maximum(end - start, 0)
    computed = rows * longest  # rows between, padded to the longest of them
    is_backwards = start > end
    cuts = []
    for _ in range(min(most, n)):
        total = cost[:, None] + computed
        total[is_backwards] = np.inf
        cheapest = total.argmin(0)
        cuts.append(cheapest)
        cost = total.min(0)
    groups = []
    j = n
    for cut in reversed(cuts):
        i = int(cut[j])
        if i < j:  # else this group is empty: fewer were enough
            first = int(starts[i])
            stop = int(starts[j])
            length = int(lengths[j - 1])
            groups.append(Span(first, stop, length))
        j = i
    return groups[::-1]


def _candidates(sizes: np.ndarray, batch_size: int) -> Arrays:
    """Rows after which a group may end, and the length that it then has."""
    count = len(sizes)
    whole_batches = np.arange(batch_size, count, batch_size)
    ends = np.append(whole_batches, count)
    lengths = sizes[ends - 1]
    # only the last batch of each length: to end within a length never pays
    changes = np.flatnonzero(np.diff(lengths))
    last = np.append(changes, len(lengths) - 1)
    if len(last) > _CANDIDATES:
        spread = np.linspace(0, len(last) - 1, _CANDIDATES)
        nearest = spread.round().astype(int)
        last = last[np.unique(nearest)]
    return ends[last], lengths[last]


def _packed(lengths: np.ndarray, longest: int, batch_size: int) -> Bins:
    """Put whole rows together so that the fewest tokens are computed.

    Best fit decreasing says how many long rows are needed. The rows are then spread evenly over as
    many, or over the next multiple of the batch size (which makes shorter ones, and no batch
    smaller than the others), whichever computes less.
    """
    fitted = _best_fit(lengths, longest)
    choices = [fitted]
    whole_batches = round_up(len(fitted), batch_size)
    at_most_rows = min(whole_batches, len(lengths))
    for count in {len(fitted), at_most_rows}:
        even = _spread(lengths, count)
        if max(_sums(lengths, even)) <= longest:
            choices.append(even)

    def computed(bins: Bins) -> int:
        longest_bin = max(_sums(lengths, bins))
        return len(bins) * longest_bin

    return min(choices, key=computed)


def _sums(lengths: np.ndarray, bins: Bins) -> list[int]:
    """Tokens in each bin."""
    return [_sum(lengths, members) for members in bins]


def _sum(lengths: np.ndarray, members: Bin) -> int:
    of_members = lengths[list(members)]
    return int(of_members.sum())


def _best_fit(lengths: np.ndarray, longest: int) -> Bins:
    """Longest first, each where the least room is left (best fit decreasing)."""
    bins: list[list[int]] = []
    bins_with_room: dict[int, list[int]] = {}  # bins by their free tokens
    rooms: list[int] = []  # the keys, ascending
    for i in _longest_first(lengths):
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
                del bins_with_room[room]
                del rooms[k]
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
    for i in _longest_first(lengths):
        filled, number = heap[0]
        bins[number].append(i)
        now_filled = filled + int(lengths[i])
        heapq.heapreplace(heap, (now_filled, number))
    return [tuple(members) for members in bins]


def _longest_first(lengths: np.ndarray) -> list[int]:
    """Numbers of all rows."""
    by_length = np.argsort(-lengths, kind="stable")
    return by_length.tolist()
