"""What the unquantized model predicts, stored so that it need not run when others are evaluated.

``lab.evaluation`` calls ``teacher_predictions`` and gives the result to ``engine.evaluate.judge``.

At each target the K most likely tokens are stored with their log-probabilities, and the mass of all
others as one number. The KL between what two models make of these K+1 outcomes is a lower bound of
their KL (data processing inequality): what happens inside the tail is not seen. How much there is
to see is reported as the floor.

Shapes: T targets of all rows together, one row after the other; V words in the vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from qlab.core.config.legal import check_whole
from qlab.core.progress import Progress
from qlab.engine.evaluate.predict import Predictor, chunk_length
from qlab.engine.models.fingerprint import fingerprint
from qlab.errors import DataError
from qlab.ops.sums import logsumexp
from qlab.runtime.atomic import write_file
from qlab.runtime.paths import cache_folder

KEEP = 512
_CACHED_FILES = 8
_LOG_OF_NO_MASS = -100.0  # finite, so that no NaN follows from it
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, BadZipFile)


@dataclass(frozen=True, eq=False, kw_only=True)
class TeacherPredictions:
    """Predictions at the targets of all rows, one row after the other.

    Attributes:
        rows: fingerprint of the rows.
        vocabulary: outcomes of a prediction.
        tokens: the K most likely tokens, int32 ``(T, K)``, the most likely first.
        log_probs: of these, float32 ``(T, K)``.
        tail: log of the mass of all other tokens, float32 ``(T,)``.
        nll: negative log-likelihood of the target in nats, float32 ``(T,)``.
        floor: KL of the prediction to what was stored of it, the tail spread evenly, in nats,
            float32 ``(T,)``.
    """

    rows: str
    vocabulary: int
    tokens: np.ndarray
    log_probs: np.ndarray
    tail: np.ndarray
    nll: np.ndarray
    floor: np.ndarray

    def __getitem__(self, part: slice) -> TeacherPredictions:
        """Return the predictions of some targets."""
        return TeacherPredictions(
            rows=self.rows,
            vocabulary=self.vocabulary,
            tokens=self.tokens[part],
            log_probs=self.log_probs[part],
            tail=self.tail[part],
            nll=self.nll[part],
            floor=self.floor[part],
        )

    @property
    def is_exact(self) -> bool:
        """Whether the whole vocabulary was stored."""
        return self.tokens.shape[1] == self.vocabulary

    @property
    def description(self) -> str:
        """What was stored, in words."""
        if self.is_exact:
            return "exact"
        return f"stored for the {self.tokens.shape[1]} likeliest of {self.vocabulary} tokens"

    @property
    def floor_nats(self) -> float:
        """Mean floor in nats/token."""
        return float(self.floor.mean())


def target_positions(row: Any) -> np.ndarray:
    """Return the positions of a row whose next token is a target, int32."""
    return np.flatnonzero(np.asarray(row.mask)[1:]).astype(np.int32)


def rows_with_targets(rows: Sequence[Any]) -> list[Any]:
    """Return the rows that have targets.

    Args:
        rows: objects with ``tokens`` ``(length,)`` and ``mask`` ``(length,)``, 1 where a token is a
            target; the first never is.

    Raises:
        DataError: tokens and mask differ in length, or no row has a target.
    """
    for number, row in enumerate(rows):
        if not hasattr(row, "tokens") or not hasattr(row, "mask"):
            raise DataError(
                f"Row {number} has no tokens and mask: {type(row).__name__}. "
                "Rows are what qlab reads from data."
            )
        tokens_shape = np.shape(row.tokens)
        mask_shape = np.shape(row.mask)
        if tokens_shape != mask_shape or len(tokens_shape) != 1:
            raise DataError(
                f"Row {number}: tokens are {tokens_shape}, but the mask is {mask_shape}."
            )
    usable = [row for row in rows if target_positions(row).size]
    if rows and not usable:
        raise DataError(
            f"None of the {len(rows)} rows has a target, so there is nothing to judge by."
        )
    return usable


def rows_fingerprint(rows: Sequence[Any]) -> str:
    """Return a hash of all tokens and masks, in order."""
    digest = sha256()
    for row in rows:
        digest.update(np.asarray(row.tokens, np.int32).tobytes())
        digest.update(b"|")
        digest.update(np.asarray(row.mask, np.uint8).tobytes())
        digest.update(b";")
    return digest.hexdigest()


def check_tokens(rows: Sequence[Any], vocabulary: int) -> None:
    """Refuse tokens that the model does not have: MLX would read foreign memory.

    Raises:
        DataError: there is one.
    """
    for number, row in enumerate(rows):
        wrong = [int(token) for token in row.tokens if not 0 <= token < vocabulary]
        if wrong:
            raise DataError(
                f"Row {number} has token {wrong[0]}, "
                f"but the model's tokens are 0 to {vocabulary - 1}."
            )


def teacher_predictions(
    teacher: nn.Module, rows: Sequence[Any], keep: int = KEEP, folder: Path | None = None
) -> Generator[Progress, None, TeacherPredictions]:
    """Return a model's predictions for rows, from the cache on disk or computed and written there.

    Args:
        teacher: the unquantized model.
        rows: see ``rows_with_targets``.
        keep: tokens stored at each target; the whole vocabulary, if it is smaller.
        folder: of the cache; by default in the user's cache, where the newest eight files stay.

    Yields:
        Progress after each row.

    Raises:
        ConfigError: ``keep`` is no whole number above 0.
        DataError: the rows have no targets, or tokens that the model does not have.
    """
    check_whole("keep", keep, 1)
    rows = rows_with_targets(rows)
    if not rows:
        raise DataError("There are no rows to judge by.")
    rows_hash = rows_fingerprint(rows)
    path = _path(folder, f"{fingerprint(teacher)} {rows_hash} {keep}")
    predictions = _read(path, rows_hash)
    if predictions is None:
        predictions = yield from _predict(teacher, rows, keep, rows_hash)
        _write(path, predictions)
    return predictions


class _Stored(NamedTuple):
    """Arrays of ``TeacherPredictions`` for some targets, in its order."""

    tokens: mx.array
    log_probs: mx.array
    tail: mx.array
    nll: mx.array
    floor: mx.array


def _predict(
    teacher: nn.Module, rows: Sequence[Any], keep: int, rows_hash: str
) -> Generator[Progress, None, TeacherPredictions]:
    predictor = Predictor(teacher)
    check_tokens(rows, predictor.vocabulary)
    step = chunk_length(predictor.vocabulary)
    chunks: list[list[np.ndarray]] = []
    for number, row in enumerate(rows):
        tokens = np.asarray(row.tokens, np.int32)
        where = target_positions(row)
        targets = mx.array(tokens[where + 1])
        hidden = predictor.hidden(mx.array(tokens[None, :-1]), mx.array(where))
        for start in range(0, where.size, step):
            part = slice(start, start + step)
            stored = _likeliest(predictor.log_probs(hidden[part]), targets[part], keep)
            mx.eval(stored)
            chunks.append([np.array(array) for array in stored])
        yield Progress("full precision", number + 1, len(rows))
    tokens, log_probs, tail, nll, floor = map(np.concatenate, zip(*chunks, strict=True))
    return TeacherPredictions(
        rows=rows_hash,
        vocabulary=predictor.vocabulary,
        tokens=tokens,
        log_probs=log_probs,
        tail=tail,
        nll=nll,
        floor=floor,
    )


def _likeliest(log_probs: mx.array, targets: mx.array, keep: int) -> _Stored:
    """Return what is stored of some predictions, lazily.

    Args:
        log_probs: ``(n, V)``.
        targets: ``(n,)``.
        keep: tokens to store.
    """
    nll = -mx.take_along_axis(log_probs, targets[:, None], -1)[:, 0]
    if keep >= log_probs.shape[-1]:
        tokens = mx.argsort(-log_probs, -1)  # (n, V)
        likely = mx.take_along_axis(log_probs, tokens, -1)
        none = mx.zeros_like(nll)
        return _Stored(tokens.astype(mx.int32), likely, none + _LOG_OF_NO_MASS, nll, none)
    order = mx.argpartition(-log_probs, keep, -1)
    unsorted = order[:, :keep]
    ranks = mx.argsort(-mx.take_along_axis(log_probs, unsorted, -1), -1)
    tokens = mx.take_along_axis(unsorted, ranks, -1)  # (n, keep), the most likely first
    likely = mx.take_along_axis(log_probs, tokens, -1)
    others = mx.take_along_axis(log_probs, order[:, keep:], -1)  # (n, V − keep)
    tail = logsumexp(others)
    floor = _tail_floor(others, tail)
    return _Stored(tokens.astype(mx.int32), likely, tail, nll, floor)


def _tail_floor(others: mx.array, tail: mx.array) -> mx.array:
    """KL of the tail to an even one: Σ p·log p − P·log(P/m) over its m tokens, P their mass.

    Args:
        others: log-probabilities ``(n, m)``.
        tail: log of their sum, ``(n,)``.
    """
    log_of_even = tail[:, None] - np.log(others.shape[1])
    kl = (mx.exp(others) * (others - log_of_even)).sum(-1)
    return mx.maximum(kl, 0)


def _path(folder: Path | None, key: str) -> Path:
    name = sha256(key.encode()).hexdigest()[:32]
    if folder is None:
        folder = cache_folder() / "teachers"
    return folder / f"{name}.npz"


def _read(path: Path, rows_hash: str) -> TeacherPredictions | None:
    """Return what a file holds; None if it is missing, broken or of other rows."""
    try:
        with path.open("rb") as file, np.load(file) as stored:
            arrays = {f.name: stored[f.name] for f in fields(TeacherPredictions)}
        os.utime(path)  # used now, so it stays longest
    except _UNREADABLE:
        return None
    rows = str(arrays.pop("rows"))
    vocabulary = int(arrays.pop("vocabulary"))
    if rows != rows_hash:
        return None
    return TeacherPredictions(rows=rows, vocabulary=vocabulary, **arrays)


def _write(path: Path, predictions: TeacherPredictions) -> None:
    """Write the file whole or not at all; a cache that cannot be written costs only time."""
    stored = {f.name: getattr(predictions, f.name) for f in fields(TeacherPredictions)}
    try:
        write_file(path, lambda new: np.savez(new, **stored))
        oldest_first = sorted(path.parent.glob("*.npz"), key=lambda file: file.stat().st_mtime)
        for old in oldest_first[:-_CACHED_FILES]:
            old.unlink(missing_ok=True)
    except OSError:
        return
