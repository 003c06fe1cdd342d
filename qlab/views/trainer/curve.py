"""The curve of a run as the browser gets it: a row of numbers a step, thinned where a run is long.

A ``Curve`` grows with the run: what was encoded once is not encoded again, so that showing step
100 000 costs no more than step 100. The panel, the report and the table of runs draw from it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from qlab.core.arithmetic import ceil_div
from qlab.core.train.events import StepEvent

COLUMNS = (
    "step",
    "loss",
    "smooth",
    "val_loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "active_nbytes",
    "peak_nbytes",
    "epoch",
)
LOSS = COLUMNS.index("loss")
SMOOTH = COLUMNS.index("smooth")
VAL = COLUMNS.index("val_loss")
NORM = COLUMNS.index("grad_norm")
_SPAN = 12  # the smoothed loss looks back over about a twelfth of the steps so far
_FIRST_ROWS = 256
_BLOCK_NBYTES = 128 * 4 * len(COLUMNS)  # rows go from the newest to the settled by so many


class Curve:
    """The steps of a run, thinned to about ``limit`` of them.

    Of every stretch of equally many steps the smallest and the largest loss and the largest
    gradient norm stay; so do all validations and marks, until these alone are more than half the
    limit.

    Args:
        limit: rows to retain.

    Attributes:
        marks: ``[step, kind, text]`` of each mark on the time line.
    """

    def __init__(self, limit: int = 2000) -> None:
        self._limit = limit
        self._reset()

    def _reset(self) -> None:
        self._all = np.empty((_FIRST_ROWS, len(COLUMNS)), "<f4")
        self._pinned = np.zeros(_FIRST_ROWS, bool)
        self._count = 0
        self._pins = 0
        self._last = None
        self._smooth = math.nan
        self._losses = 0
        self.marks: list[list[Any]] = []
        self._restart(stride=1)

    def _restart(self, stride: int) -> None:
        self._stride = stride
        self._closed = 0
        self._prefix = bytearray()
        self._kept = 0

    def extend(self, history: tuple[StepEvent, ...]) -> None:
        """Take in the events that are new since the last call.

        Start over if the history is another one.
        """
        seen = self._count
        if seen and (len(history) < seen or history[seen - 1] is not self._last):
            self._reset()
        for event in history[self._count :]:
            self._append(event)
        self._last = history[-1] if history else None

    def _append(self, event: StepEvent) -> None:
        n = self._count
        if n == len(self._all):
            self._all = np.concatenate([self._all, np.empty_like(self._all)])
            self._pinned = np.concatenate([self._pinned, np.zeros_like(self._pinned)])
        self._smooth_in(event.loss)
        val_loss = math.nan if event.val_loss is None else event.val_loss
        self._all[n] = (
            event.step,
            event.loss,
            self._smooth,
            val_loss,
            event.learning_rate,
            event.grad_norm,
            event.tokens_per_second or math.nan,
            event.active_nbytes,
            event.peak_nbytes,
            event.epoch,
        )
        self._pinned[n] = event.val_loss is not None or bool(event.marks)
        self._pins += int(self._pinned[n])
        self.marks += [[event.step, mark.kind, mark.text] for mark in event.marks]
        self._count = n + 1

    def _smooth_in(self, loss: float) -> None:
        """Take a loss into the smoothed one, which follows ever more slowly."""
        if not math.isfinite(loss):
            return
        self._losses += 1
        if self._losses == 1:
            self._smooth = loss
        else:
            share = 1 / (1 + self._losses / _SPAN)
            self._smooth += share * (loss - self._smooth)

    def encoded(self) -> bytes:
        """Return the rows that stay as little-endian float32, in the order of ``COLUMNS``.

        NaN stands where nothing was measured.
        """
        self._close()
        tail = self._all[self._closed : self._count]
        chosen = self._choose(self._closed, self._count)
        if len(tail) and (not len(chosen) or chosen[-1] != self._count - 1):
            chosen = np.append(chosen, self._count - 1)  # the newest step is always shown
        return bytes(self._prefix) + self._all[chosen].tobytes()

    def parts(self) -> tuple[bytes, bytes]:
        """Return ``encoded`` in two: rows that stay for many steps, and the newest.

        Only the newest are sent after every step.
        """
        whole = self.encoded()
        settled = len(self._prefix) - len(self._prefix) % _BLOCK_NBYTES
        return whole[:settled], whole[settled:]

    def rows(self) -> np.ndarray:
        """Return the rows that stay, float32 ``(rows, len(COLUMNS))``."""
        return np.frombuffer(self.encoded(), "<f4").reshape(-1, len(COLUMNS))

    def _close(self) -> None:
        """Encode the stretches that are complete; make them longer as soon as they are too many."""
        while True:
            whole = self._count - self._count % self._stride
            if whole > self._closed:
                chosen = self._choose(self._closed, whole)
                self._prefix += self._all[chosen].tobytes()
                self._kept += len(chosen)
                self._closed = whole
            if self._kept <= self._limit:
                return
            self._restart(2 * self._stride)

    def _choose(self, start: int, stop: int) -> np.ndarray:
        if stop <= start or self._stride == 1:
            return np.arange(start, stop)
        pinned = self._pinned[start:stop]
        crowded = self._pins > self._limit // 2
        return start + thinned(self._all[start:stop], self._stride, pinned, crowded)


def thinned(rows: np.ndarray, stride: int, pinned: np.ndarray, crowded: bool = False) -> np.ndarray:
    """Return which rows stay, in order.

    Args:
        rows: ``(N, len(COLUMNS))``.
        stride: length of a stretch.
        pinned: bool ``(N,)``, rows that stay in any case.
        crowded: whether too many are pinned: then only the smallest and the largest validation of a
            stretch stay.
    """
    stretches = ceil_div(len(rows), stride)

    def extremes(column: int, sign: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the row with the largest ``sign · value`` of every stretch; is it finite?"""
        padded = np.full(stretches * stride, -np.inf)
        values = sign * rows[:, column]
        padded[: len(rows)] = np.where(np.isfinite(values), values, -np.inf)
        places = np.arange(stretches) * stride + padded.reshape(stretches, stride).argmax(axis=1)
        return places, np.isfinite(padded[places])

    # of a stretch without any loss its first row stays, so that the gap has its place
    lowest, _ = extremes(LOSS, -1)
    chosen = [lowest]
    searches = [(LOSS, 1), (NORM, 1)]
    if crowded:
        searches += [(VAL, -1), (VAL, 1)]
    for column, sign in searches:
        places, finite = extremes(column, sign)
        chosen.append(places[finite])
    if not crowded:
        chosen.append(np.flatnonzero(pinned))
    return np.unique(np.concatenate(chosen))
