"""The processes of one run, joined by ``mx.distributed``; a single process sends nothing.

What is sent is computed first and awaited at once, so that every process sends in the same order,
whatever graph it built. The loop and ``qlab.run`` use it.
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
# where a launcher says how many processes it started
_WORLDS = ("MLX_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE")


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
        self.rank = group.rank() if group else 0
        self.size = group.size() if group else 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and shows."""
        return self.rank == 0

    def share(self, batch: Batch) -> Batch:
        """Return this process's rows of a batch; there may be none in a batch that is not full."""
        if self.size == 1:
            return batch
        return part(batch, self.rank, self.size)

    def key(self, key: mx.array) -> mx.array:
        """Return this process's random key of a batch: each process drops other inputs."""
        if self.size == 1:
            return key
        keys = mx.random.split(key, self.size)
        return keys[self.rank]

    def total(self, sums: LossAndGradients) -> LossAndGradients:
        """Sum loss, gradients and counts over all processes; equal everywhere, bit for bit.

        Raises:
            RankError: another process is gone.
        """
        if self.size == 1:
            return sums
        arrays = [sums.loss, sums.count, *sums.grads.values()]
        loss, count, *totals = self._added(arrays)
        by_path = zip(sums.grads, totals, strict=True)
        return LossAndGradients(loss, dict(by_path), count)

    def all_nats(self, share: Nats) -> Nats:
        """Sum the validation losses of all processes."""
        if self.size == 1:
            return share
        texts = self.gather(f"{share.total!r} {share.count}")
        result = Nats()
        for text in texts:
            total, count = text.split()
            result = result + Nats(float(total), int(count))
        return result

    def from_first(self, arrays: Arrays) -> Arrays:
        """Return the first process's arrays."""
        if self.size == 1:
            return arrays
        values = list(arrays.values())
        if not self.first:
            values = [mx.zeros_like(array) for array in values]
        totals = self._added(values)
        by_name = zip(arrays, totals, strict=True)
        return dict(by_name)

    def gather(self, text: str) -> list[str]:
        """Return every process's text, cut to 1024 bytes, by rank."""
        if self.size == 1:
            return [text]
        # each process fills its row of (size, 1024), so that the sum has the texts of all
        table = np.zeros((self.size, _LONGEST), np.int32)
        content = text.encode()[:_LONGEST]
        encoded = np.frombuffer(content, np.uint8)
        table[self.rank, : encoded.size] = encoded
        total = self._sum(mx.array(table))
        texts = np.array(total).astype(np.uint8)
        return [_decoded(row) for row in texts]

    def agreed(self, text: str) -> str:
        """Return the first text that is not empty of any process; the same everywhere."""
        return next(filter(None, self.gather(text)), "")

    def check_same(self, facts: Mapping[str, str]) -> None:
        """Refuse processes that would not train the same.

        Args:
            facts: what must be equal everywhere, by name; the same names everywhere.

        Raises:
            RankError: names what differs, and where.
        """
        hashes = [_short_hash(fact) for fact in facts.values()]
        texts = self.gather(" ".join(hashes))
        by_rank = [text.split() for text in texts]
        differences = []
        for name, of_ranks in zip(facts, zip(*by_rank, strict=True), strict=True):
            first = of_ranks[0]
            others = [rank for rank, fact in enumerate(of_ranks) if fact != first]
            if others:
                ranks = ", ".join(f"rank {rank}" for rank in others)
                differences.append(f"{name} ({ranks})")
        if differences:
            raise RankError(
                "These differ from rank 0, so the processes cannot train together: "
                f"{'; '.join(differences)}."
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
        return [total for bundle in bundles for total in self._sent(bundle)]

    def _sent(self, bundle: list[mx.array]) -> list[mx.array]:
        flat = mx.concatenate([array.reshape(-1).astype(mx.float32) for array in bundle])
        total = self._sum(flat)
        sizes = [array.size for array in bundle]
        ends = np.cumsum(sizes)[:-1].tolist()
        parts = mx.split(total, ends)
        return list(map(_shaped_like, parts, bundle))

    def _sum(self, array: mx.array) -> mx.array:
        """Sum over all processes: the one operation that every backend has (NCCL has no other)."""
        try:
            total = mx.distributed.all_sum(array, group=self._group)
            mx.eval(total)
            return total
        except RuntimeError as error:
            raise RankError(
                f"Rank {self.rank} of {self.size} lost another process: {error}."
            ) from None


def _short_hash(fact: str) -> str:
    digest = sha256(fact.encode())
    return digest.hexdigest()[:16]


def _decoded(row: np.ndarray) -> str:
    """Return the text of a row of bytes that ends in zeros."""
    content = bytes(row).rstrip(b"\0")
    return content.decode(errors="ignore")


def _shaped_like(total: mx.array, array: mx.array) -> mx.array:
    """Return a flat total in the shape and dtype of what was added."""
    shaped = total.reshape(array.shape)
    return shaped.astype(array.dtype)


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
    counts = [os.environ.get(name) or 1 for name in _WORLDS]
    launched = max(map(int, counts))
    if launched != group.size() == 1:
        raise RankError(
            f"{launched} processes were launched, but this MLX joins none of them by that backend; "
            "give mlx.launch another, such as --backend ring."
        )
    return Ranks(group) if group.size() > 1 else ALONE
