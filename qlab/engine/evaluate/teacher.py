"""What the unquantized model predicts, kept so that it need not be in memory, nor run, when others
are judged by it.

At each target position the K most likely tokens are kept with their log-probabilities, and the mass
of all others as one number. KL between what two models make of these K+1 outcomes is a lower bound
of their KL (data processing inequality): what happens inside the tail is not seen. How much there
is to see is told as the floor. Knows no student.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from qlab.core.config.legal import check_whole
from qlab.core.progress import Progress
from qlab.engine.evaluate.predict import Predictor, chunk_length
from qlab.engine.models.fingerprint import fingerprint
from qlab.errors import DataError
from qlab.runtime.atomic import write_file
from qlab.runtime.paths import cache_folder

KEEP = 512
_FILES = 8  # that stay in the cache
_LEAST = -100.0  # log of a mass that is none


@dataclass(frozen=True, eq=False)
class Kept:
    """Predictions at the targets of all rows, one row after the other.

    Attributes:
        rows: fingerprint of the rows.
        vocabulary: outcomes of a prediction.
        tokens: the K most likely tokens, int32 ``(T, K)``, the most likely first.
        log_probs: of these, float32 ``(T, K)``.
        tail: log of the mass of all other tokens, float32 ``(T,)``.
        nll: negative log-likelihood of the target in nats, float32 ``(T,)``.
        floor: KL of the prediction to what was kept of it, the tail spread evenly, in nats, float32
            ``(T,)``.
    """

    rows: str
    vocabulary: int
    tokens: np.ndarray
    log_probs: np.ndarray
    tail: np.ndarray
    nll: np.ndarray
    floor: np.ndarray

    def __getitem__(self, part: slice) -> Kept:
        """Return the predictions of some targets."""
        arrays = (self.tokens, self.log_probs, self.tail, self.nll, self.floor)
        return Kept(self.rows, self.vocabulary, *(array[part] for array in arrays))

    @property
    def words(self) -> str:
        """What was kept, in words."""
        keep = self.tokens.shape[1]
        return (
            "exact"
            if keep == self.vocabulary
            else f"kept for the {keep} likeliest of {self.vocabulary} tokens"
        )

    @property
    def floor_nats(self) -> float:
        """Mean floor in nats per target."""
        return float(self.floor.mean())


def spots(row: Any) -> np.ndarray:
    """Return the positions of a row whose next token is a target, int32."""
    return np.flatnonzero(np.asarray(row.mask)[1:]).astype(np.int32)


def checked(rows: Sequence[Any]) -> list[Any]:
    """Return the rows that have targets.

    Args:
        rows: objects with ``tokens`` ``(T,)`` and ``mask`` ``(T,)``, 1 where a token is a target;
            the first never is.

    Raises:
        DataError: tokens and mask differ in length, or no row has a target.
    """
    for number, row in enumerate(rows):
        if not hasattr(row, "tokens") or not hasattr(row, "mask"):
            raise DataError(
                f"Row {number} has no tokens and mask: {type(row).__name__}. Rows are what qlab reads from data."
            )
        if np.shape(row.tokens) != np.shape(row.mask) or np.ndim(row.tokens) != 1:
            raise DataError(
                f"Row {number}: tokens are {np.shape(row.tokens)}, but the mask is {np.shape(row.mask)}."
            )
    found = [row for row in rows if spots(row).size]
    if rows and not found:
        raise DataError(
            f"None of the {len(rows)} rows has a target, so there is nothing to judge by."
        )
    return found


def rows_fingerprint(rows: Sequence[Any]) -> str:
    """Hash of all tokens and masks, in order."""
    digest = sha256()
    for row in rows:
        digest.update(
            np.asarray(row.tokens, np.int32).tobytes()
            + b"|"
            + np.asarray(row.mask, np.uint8).tobytes()
            + b";"
        )
    return digest.hexdigest()


def check_tokens(rows: Sequence[Any], vocabulary: int) -> None:
    """Refuse tokens that the model has not: MLX would read foreign memory.

    Raises:
        DataError: there is one.
    """
    for number, row in enumerate(rows):
        wrong = [int(token) for token in row.tokens if not 0 <= token < vocabulary]
        if wrong:
            raise DataError(
                f"Row {number} has token {wrong[0]}, but the model's tokens are 0 to {vocabulary - 1}."
            )


def remember(
    teacher: nn.Module, rows: Sequence[Any], keep: int = KEEP, folder: Path | None = None
) -> Generator[Progress, None, Kept]:
    """Return a model's predictions for rows: from the cache on disk, or made and written there.

    Args:
        teacher: the unquantized model.
        rows: see ``checked``.
        keep: tokens kept at each position; the whole vocabulary, if it is smaller.
        folder: of the cache; by default in the user's cache, where the newest eight stay.

    Yields:
        Progress after each row.

    Raises:
        ConfigError: ``keep`` is no whole number above 0.
        DataError: the rows have no targets, or tokens that the model has not.
    """
    check_whole("keep", keep, 1)
    rows = checked(rows)
    if not rows:
        raise DataError("There are no rows to judge by.")
    made_of = rows_fingerprint(rows)
    path = _path(folder, f"{fingerprint(teacher)} {made_of} {keep}")
    kept = _read(path, made_of)
    if kept is None:
        kept = yield from _run(teacher, rows, keep, made_of)
        _write(path, kept)
    return kept


def _run(
    teacher: nn.Module, rows: list[Any], keep: int, made_of: str
) -> Generator[Progress, None, Kept]:
    predictor = Predictor(teacher)
    parts = []
    check_tokens(rows, predictor.vocabulary)
    for number, row in enumerate(rows):
        where = spots(row)
        hidden = predictor.hidden(
            mx.array(np.asarray(row.tokens, np.int32)[None, :-1]), mx.array(where)
        )
        targets = mx.array(np.asarray(row.tokens, np.int32)[where + 1])
        chunk = chunk_length(predictor.vocabulary)
        for start in range(0, where.size, chunk):
            found = _keep(
                predictor.log_probs(hidden[start : start + chunk]),
                targets[start : start + chunk],
                keep,
            )
            mx.eval(found)
            parts.append([np.array(array) for array in found])
        yield Progress("full precision", number + 1, len(rows))
    return Kept(
        made_of, predictor.vocabulary, *(np.concatenate(part) for part in zip(*parts, strict=True))
    )


def _keep(log_probs: mx.array, targets: mx.array, keep: int) -> list[mx.array]:
    """Return tokens, log-probabilities, tail, nll and floor of a chunk, lazily."""
    vocabulary = log_probs.shape[-1]
    nll = -mx.take_along_axis(log_probs, targets[:, None], -1)[:, 0]
    if keep >= vocabulary:
        tokens = mx.argsort(-log_probs, -1)
        rest = mx.zeros((log_probs.shape[0], 0), mx.uint32)
    else:
        order = mx.argpartition(-log_probs, keep, -1)
        tokens = order[:, :keep]
        rest = order[:, keep:]
        ranks = mx.argsort(-mx.take_along_axis(log_probs, tokens, -1), -1)
        tokens = mx.take_along_axis(tokens, ranks, -1)
    likely = mx.take_along_axis(log_probs, tokens, -1)
    if not rest.shape[1]:
        none = mx.zeros_like(nll)
        return [tokens.astype(mx.int32), likely, none + _LEAST, nll, none]
    others = mx.take_along_axis(log_probs, rest, -1)
    tail = mx.logsumexp(others, -1)
    # Σ p log p − P log(P / n) over the n others, P their mass
    floor = mx.maximum(
        (mx.exp(others) * (others - tail[:, None] + np.log(rest.shape[1]))).sum(-1), 0
    )
    return [tokens.astype(mx.int32), likely, tail, nll, floor]


def _path(folder: Path | None, key: str) -> Path:
    return (folder or cache_folder() / "teachers") / f"{sha256(key.encode()).hexdigest()[:32]}.npz"


def _read(path: Path, made_of: str) -> Kept | None:
    try:
        with path.open("rb") as file, np.load(file) as stored:
            found = {f.name: stored[f.name] for f in fields(Kept)}
        os.utime(path)  # used now, so it stays longest
    except (
        OSError,
        ValueError,
        KeyError,
        EOFError,
        BadZipFile,
    ):  # missing or broken: it is made again
        return None
    kept = Kept(**{**found, "rows": str(found["rows"]), "vocabulary": int(found["vocabulary"])})
    return kept if kept.rows == made_of else None


def _write(path: Path, kept: Kept) -> None:
    """Write the file whole or not at all; a cache that cannot be written costs only time."""
    try:
        stored = {f.name: getattr(kept, f.name) for f in fields(Kept)}
        write_file(path, lambda new: np.savez(new, **stored))
        for old in sorted(path.parent.glob("*.npz"), key=lambda p: p.stat().st_mtime)[:-_FILES]:
            old.unlink(missing_ok=True)
    except OSError:
        return
