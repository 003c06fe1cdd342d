"""The processes of one run, joined by ``mx.distributed``. A single process is a run like any other.

Nothing is sent.

What is sent is computed first and awaited at once, so that every process sends in the same order,
whatever graph it built. Knows no model and no file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import mlx.core as mx
import numpy as np

from qlab.core.train.rows import Batch
from qlab.engine.data.batches import part
from qlab.engine.step.protocol import Arrays, LossAndGradients
from qlab.engine.train.validate import Nats
from qlab.errors import RankError

_BUNDLE = 1 << 23  # numbers sent at once: few messages, and little memory beside the gradients
_LONGEST = 1024  # bytes of a text
_WORLDS = (
    "MLX_WORLD_SIZE",
    "OMPI_COMM_WORLD_SIZE",
)  # where a launcher says how many processes it started


class Ranks:
    """The processes that train together, seen from one of them. Everything runs on the MLX thread.

    Args:
        group: of processes; None is this one alone.

    Attributes:
        rank: number of this process; 0 writes and shows.
        size: number of processes.
    """

    def __init__(self, group: mx.distributed.Group | None = None) -> None:
        self._group = group
        self.rank, self.size = (group.rank(), group.size()) if group else (0, 1)

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and shows."""
        return self.rank == 0

    def share(self, batch: Batch) -> Batch:
        """Return this process's rows of a batch; there may be none in a batch that is not full."""
        return batch if self.size == 1 else part(batch, self.rank, self.size)

    def key(self, key: mx.array) -> mx.array:
        """Return this process's key of a batch: each drops inputs of its own."""
        return key if self.size == 1 else mx.random.split(key, self.size)[self.rank]

    def total(self, sums: LossAndGradients) -> LossAndGradients:
        """Add what every process's rows add up to; the result is the same everywhere, bit for bit.

        Raises:
            RankError: another process is gone.
        """
        if self.size == 1:
            return sums
        loss, count, *grads = self._added([sums.loss, sums.count, *sums.grads.values()])
        return LossAndGradients(loss, dict(zip(sums.grads, grads, strict=True)), count)

    def all_nats(self, own: Nats) -> Nats:
        """Add the losses of every process's rows held out."""
        if self.size == 1:
            return own
        found = [text.split() for text in self.gather(f"{own.total!r} {own.count}")]
        return sum((Nats(float(total), int(count)) for total, count in found), Nats())

    def from_first(self, arrays: Arrays) -> Arrays:
        """Return the first process's arrays."""
        if self.size == 1:
            return arrays
        given = arrays.values() if self.first else map(mx.zeros_like, arrays.values())
        return dict(zip(arrays, self._added(list(given)), strict=True))

    def gather(self, text: str) -> list[str]:
        """Return every process's text, cut to 1024 bytes, by rank."""
        if self.size == 1:
            return [text]
        said = np.zeros(
            (self.size, _LONGEST), np.int32
        )  # each fills a row of its own, so that the sum has all of them
        own = np.frombuffer(text.encode()[:_LONGEST], np.uint8)
        said[self.rank, : own.size] = own
        found = np.array(self._sum(mx.array(said))).astype(np.uint8)
        return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in found]

    def agreed(self, text: str) -> str:
        """Return the first text that any process has to say, or an empty one: the same everywhere."""
        return next(filter(None, self.gather(text)), "")

    def check_same(self, facts: Mapping[str, str]) -> None:
        """Refuse processes that would not train the same.

        Args:
            facts: what must be equal everywhere, by name; the same names everywhere.

        Raises:
            RankError: names what differs, and where.
        """
        digests = [
            text.split()
            for text in self.gather(
                " ".join(sha256(x.encode()).hexdigest()[:16] for x in facts.values())
            )
        ]
        differ = {
            name: [rank for rank, own in enumerate(digests) if own[n] != digests[0][n]]
            for n, name in enumerate(facts)
        }
        told = [
            f"{name} ({', '.join(f'rank {rank}' for rank in ranks)})"
            for name, ranks in differ.items()
            if ranks
        ]
        if told:
            raise RankError(
                f"These differ from rank 0, so the processes cannot train together: {'; '.join(told)}."
            )

    def _added(self, arrays: list[mx.array]) -> list[mx.array]:
        """Add arrays over all processes, in float32."""
        bundles: list[list[mx.array]] = []
        room = 0
        for array in arrays:
            if not bundles or array.size > room:
                bundles.append([])
                room = _BUNDLE
            bundles[-1].append(array)
            room -= array.size
        mx.eval(arrays)
        return [made for bundle in bundles for made in self._sent(bundle)]

    def _sent(self, bundle: list[mx.array]) -> list[mx.array]:
        flat = mx.concatenate([array.reshape(-1).astype(mx.float32) for array in bundle])
        total = self._sum(flat)
        ends = np.cumsum([array.size for array in bundle])[:-1].tolist()
        parts = zip(mx.split(total, ends), bundle, strict=True)
        return [own.reshape(array.shape).astype(array.dtype) for own, array in parts]

    def _sum(self, array: mx.array) -> mx.array:
        """The one thing that is sent: every back end of MLX has it, NCCL nothing else."""
        try:
            made = mx.distributed.all_sum(array, group=self._group)
            mx.eval(made)
            return made
        except RuntimeError as error:
            raise RankError(
                f"Rank {self.rank} of {self.size} lost another process: {error}."
            ) from None


ALONE = Ranks()


def joined() -> Ranks:
    """Return the processes that were launched together, ``ALONE`` if there is one.

    Runs on the MLX thread.

    Raises:
        RankError: several were launched, but this MLX cannot join them.
    """
    try:
        group: Any = mx.distributed.init()
    except RuntimeError as error:
        raise RankError(f"The processes could not be joined: {error}.") from None
    launched = max(int(os.environ.get(name) or 1) for name in _WORLDS)
    if launched != group.size() == 1:
        raise RankError(
            f"{launched} processes were launched, but this MLX joins none of them by that backend; "
            "give mlx.launch another, such as --backend ring."
        )
    return Ranks(group) if group.size() > 1 else ALONE
