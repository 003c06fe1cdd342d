"""The sizes that a step's memory depends on, and those at which a step is read for its formula.

``Forecast`` asks for them; ``formula`` writes memory as multiples of their products. Pure
arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

QUANTITIES = ("batch", "tokens", "length", "rank", "chunk", "rest")
"""Rows of a batch; positions of a row that have a target; positions of a row; rank of the adapter;
positions in a chunk of the loss; positions in its last chunk.
"""

CHUNKS = 4  # a loss in more chunks than this needs what one in this many needs


@dataclass(frozen=True)
class _Trace:
    """How large a reference is: its share of a full chunk decides how long the last chunk is."""

    batch: int
    tokens: int
    rank: int
    last_chunk: float


# ratios of the two traces must tell products of quantities apart, and no number may be a size of
# something else in a model
_TRACES = (_Trace(3, 113, 5, 0.4), _Trace(5, 239, 7, 0.9))
# the same where only tokens in tiles of 128 are computed as most tokens are
_TRACES_IN_TILES = (_Trace(4, 384, 5, 0.4), _Trace(7, 640, 6, 0.9))


@dataclass(frozen=True)
class Reference:
    """Sizes at which a step is read.

    Attributes:
        batch: rows.
        tokens: positions of a row that have a target.
        rank: of the adapter.
        chunk: positions in a chunk of the loss; 0 is all at once.
    """

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
    small, large = _TRACES_IN_TILES if tiles else _TRACES
    # ranks differ where the model allows it
    return (
        _reference(small, chunks, max(widest - 1, 1)),
        _reference(large, chunks, widest),
    )


def _reference(trace: _Trace, chunks: int, widest: int) -> Reference:
    positions = trace.batch * trace.tokens
    # whole chunks and a shorter last one
    if chunks > 1:
        chunk = ceil(positions / (chunks - 1 + trace.last_chunk))
    else:
        chunk = chunks * positions
    return Reference(trace.batch, trace.tokens, min(trace.rank, widest), chunk)


def chunks(batch: int, length: int, chunk: int) -> int:
    """Return in how many chunks a loss is made, counted up to ``CHUNKS``.

    Args:
        batch: rows.
        length: positions of a row.
        chunk: positions in a chunk; 0 is all at once.
    """
    if not chunk:
        return 1
    return min(ceil(batch * (length - 1) / chunk), CHUNKS)


def sizes(batch: int, length: int, rank: int, chunk: int) -> tuple[int, ...]:
    """Return the value of every quantity, in the order of ``QUANTITIES``.

    Args:
        batch: rows.
        length: positions of a row.
        rank: of the adapter.
        chunk: positions in a chunk of the loss; 0 is all at once.
    """
    tokens = length - 1
    positions = batch * tokens
    if not chunk or chunk >= positions:
        return batch, tokens, length, rank, 1, 1
    rest = (positions - 1) % chunk + 1
    return batch, tokens, length, rank, chunk, rest
