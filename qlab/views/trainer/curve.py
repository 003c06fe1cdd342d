"""The curve of a run as the browser gets it.

One row of numbers a step, smoothed, thinned where a run is long.

Grows with the run: what was encoded once is not encoded again, so that showing step 100 000 costs
no more than step 100. Pure numpy; knows neither how a step is computed nor how it is drawn.
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
LOSS, SMOOTH, VAL, NORM = (
    COLUMNS.index(name) for name in ("loss", "smooth", "val_loss", "grad_norm")
)
_SPAN = 12  # the smoothed loss looks back over about a twelfth of the steps so far
_FIRST_ROWS = 256
_BLOCK_NBYTES = 128 * 4 * len(COLUMNS)  # rows go from the newest to the settled by so many


class Curve:
    """The steps of a run, at most about ``limit`` of them.

    The extremes of equal stretches and everything marked.

    Args:
        limit: rows to keep. Of every stretch of steps the smallest and the largest loss and the
            largest gradient norm stay; so do all validations and marks, until these alone are more
            than half the limit.
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
        if math.isfinite(event.loss):
            self._losses += 1
            share = 1.0 if self._losses == 1 else 1 / (1 + self._losses / _SPAN)
            self._smooth = (
                event.loss
                if self._losses == 1
                else self._smooth + share * (event.loss - self._smooth)
            )
        val = math.nan if event.val_loss is None else event.val_loss
        self._all[n] = (
            event.step,
            event.loss,
            self._smooth,
            val,
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

    def encoded(self) -> bytes:
        """Return the kept rows as little-endian float32, row by row, in the order of ``COLUMNS``.

        NaN where nothing is.
        """
        self._close()
        tail = self._all[self._closed : self._count]
        chosen = self._choose(self._closed, self._count)
        if len(tail) and (not len(chosen) or chosen[-1] != self._count - 1):
            chosen = np.append(chosen, self._count - 1)  # the newest step is always shown
        return bytes(self._prefix) + self._all[chosen].tobytes()

    def parts(self) -> tuple[bytes, bytes]:
        """Return ``encoded`` in two.

        Rows that stay as they are for many steps, and the newest, which are sent every time.
        """
        whole = self.encoded()
        settled = len(self._prefix) - len(self._prefix) % _BLOCK_NBYTES
        return whole[:settled], whole[settled:]

    def rows(self) -> np.ndarray:
        """Return the kept rows, float32 ``(rows, len(COLUMNS))``."""
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
        return start + thinned(
            self._all[start:stop], self._stride, pinned, crowded=self._pins > self._limit // 2
        )


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

    def extreme(column: int, sign: int) -> tuple[np.ndarray, np.ndarray]:
        padded = np.full(stretches * stride, -np.inf)
        values = sign * rows[:, column]
        padded[: len(rows)] = np.where(np.isfinite(values), values, -np.inf)
        found = np.arange(stretches) * stride + padded.reshape(stretches, stride).argmax(axis=1)
        return found, np.isfinite(padded[found])

    lowest, _ = extreme(
        LOSS, -1
    )  # of a stretch without any loss its first row, so that the gap has its place
    wanted = [(LOSS, 1), (NORM, 1), *([(VAL, -1), (VAL, 1)] if crowded else [])]
    chosen = [found[there] for found, there in (extreme(*which) for which in wanted)]
    return np.unique(
        np.concatenate([lowest, *chosen, *([] if crowded else [np.flatnonzero(pinned)])])
    )
