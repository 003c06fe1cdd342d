"""Evaluates models side by side: likelihood of targets, KL to the unquantized model, answers.

``lab.evaluation`` calls ``judge`` for full precision, quantized, and quantized + adapter; the
report is ``core.evaluate.judge.JudgeReport``. Only target tokens count: what comes before them in a
row is context.

Shapes: n targets of a row, V words in the vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from qlab.core.config.legal import check_whole
from qlab.core.evaluate.judge import COLUMNS, Column, JudgeReport, Sample, Scores
from qlab.core.progress import Progress
from qlab.engine.evaluate.answers import answers_of, asked_questions, samples_of
from qlab.engine.evaluate.golden import Match, Question, questions
from qlab.engine.evaluate.predict import Predictor, chunk_length
from qlab.engine.evaluate.teacher import (
    TeacherPredictions,
    check_tokens,
    rows_fingerprint,
    rows_with_targets,
    target_positions,
)
from qlab.errors import ConfigError
from qlab.ops.sums import logsumexp

FULL = COLUMNS[0]
_FLOOR_NOTE = 0.5  # share of a KL that its floor may be before the report warns


def judge(
    teacher: nn.Module | None,
    students: Mapping[str, nn.Module],
    rows: Sequence[Any] = (),
    *,
    predictions: TeacherPredictions | None = None,
    tokenizer: Any = None,
    prompts: Iterable[str] = (),
    golden: Iterable[Mapping[str, Any]] = (),
    match: Match = "exact",
    max_tokens: int = 64,
) -> Generator[Progress, None, JudgeReport]:
    """Evaluate models on held-out rows and a golden set, and let them answer prompts.

    Args:
        teacher: the unquantized model, in the first column; None if it is not in memory.
        students: models by name of column, such as ``quantized`` and ``quantized + adapter``.
        rows: objects with ``tokens`` and ``mask`` (``core.train.rows``), not trained on.
        predictions: the teacher's for these rows (``engine.evaluate.teacher``): then it does not
            run on them.
        tokenizer: mlx-lm's wrapper; needed for prompts and golden sets.
        prompts: each model answers them, greedily.
        golden: prompts with expected answers, see ``engine.evaluate.golden.questions``.
        match: see ``engine.evaluate.golden.score``.
        max_tokens: longest answer.

    Yields:
        Progress after each row and each token of an answer.

    Raises:
        ConfigError: nothing to evaluate, or on; ``predictions`` belong to other rows;
            vocabularies differ.
        DataError: rows or golden set have faults.
    """
    start = time.perf_counter()
    all_rows = [rows] if isinstance(rows, str) else list(rows)
    usable = rows_with_targets(all_rows)
    asked = asked_questions(prompts, questions(golden, match))
    _check(teacher, students, usable, predictions, tokenizer, asked, max_tokens)
    models = dict(students) if teacher is None else {FULL: teacher, **students}
    names = list(models) if predictions is None else [FULL, *students]
    tallies = {name: _Tally() for name in names}
    if usable:
        yield from _on_rows(models, tallies, usable, predictions)
    answers = yield from _answers(models, tallies, tokenizer, asked, max_tokens)
    samples = samples_of(asked, answers, tallies, match)
    columns = _columns(tallies, samples, set(models), bool(usable))
    return JudgeReport(
        columns=columns,
        samples=samples,
        rows=len(usable),
        targets=sum(target_positions(row).size for row in usable),
        teacher=_teacher_in_words(predictions) if FULL in tallies and usable else "",
        floor_nats=predictions.floor_nats if predictions else 0.0,
        seconds=time.perf_counter() - start,
        notes=_notes(columns, len(all_rows) - len(usable), predictions),
    )


def _answers(
    models: Mapping[str, nn.Module],
    tallies: Mapping[str, _Tally],
    tokenizer: Any,
    asked: Sequence[Question],
    max_tokens: int,
) -> Generator[Progress, None, dict[str, list[str]]]:
    """Let every model answer every question; return the answers by name of column."""
    answers: dict[str, list[str]] = {}
    if not asked:
        return answers
    for name, module in models.items():
        with tallies[name].clock():
            answers[name] = yield from answers_of(module, name, tokenizer, asked, max_tokens)
    yield Progress("answers", len(asked), len(asked))
    return answers


def _columns(
    tallies: Mapping[str, _Tally],
    samples: Sequence[Sample],
    in_memory: set[str],
    has_rows: bool,
) -> tuple[Column, ...]:
    columns = []
    for i, (name, tally) in enumerate(tallies.items()):
        golden: list[float] = []
        if name in in_memory:
            golden = [sample.scores[i] for sample in samples if sample.scores]
        scores = tally.scores() if has_rows else None
        columns.append(Column.of(name, scores, golden, tally.seconds))
    return tuple(columns)


def _teacher_in_words(predictions: TeacherPredictions | None) -> str:
    return "exact" if predictions is None else predictions.description


class _TargetScores(NamedTuple):
    """What a model makes of some targets, ``(n,)`` each; NaN where nothing is to compare with."""

    nll: Any
    hits: Any
    kl: Any
    flips: Any


@dataclass
class _Tally:
    """Scores of one model, row by row, float64, and the time that it took."""

    rows: list[_TargetScores] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, scores: Iterable[Any]) -> None:
        """Add the scores of a row, in the order of ``_TargetScores``."""
        self.rows.append(_TargetScores(*(np.array(values, np.float64) for values in scores)))

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Count the time within."""
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start

    def scores(self) -> Scores:
        """Sum within rows."""
        kl_each = np.concatenate([row.kl for row in self.rows])
        if np.isnan(kl_each).all():
            kl_each = kl_each[:0]
        return Scores(
            targets=np.array([row.nll.size for row in self.rows], np.float64),
            nll=np.array([row.nll.sum() for row in self.rows]),
            hits=np.array([row.hits.sum() for row in self.rows]),
            kl_nats=np.array([row.kl.sum() for row in self.rows]),
            flips=np.array([row.flips.sum() for row in self.rows]),
            kl_each=kl_each,
        )


def _on_rows(
    models: Mapping[str, nn.Module],
    tallies: Mapping[str, _Tally],
    rows: Sequence[Any],
    predictions: TeacherPredictions | None,
) -> Generator[Progress, None, None]:
    """Fill the tallies, a row at a time; of every model one chunk of logits exists at once."""
    running = {
        name: Predictor(module)
        for name, module in models.items()
        if predictions is None or name != FULL
    }
    check_tokens(rows, _shared_vocabulary(running, predictions))
    before = 0  # targets of the rows before
    for number, row in enumerate(rows):
        where = target_positions(row)
        tokens = np.asarray(row.tokens, np.int32)
        stored = None
        if predictions is not None:
            stored = predictions[before : before + where.size]
            hits = stored.tokens[:, 0] == tokens[where + 1]
            zeros = np.zeros(where.size)
            tallies[FULL].add(_TargetScores(nll=stored.nll, hits=hits, kl=zeros, flips=zeros))
        _on_row(running, tallies, tokens, where, stored)
        before += where.size
        yield Progress("judging", number + 1, len(rows))


def _shared_vocabulary(
    running: Mapping[str, Predictor], predictions: TeacherPredictions | None
) -> int:
    """Return the size of the vocabulary that all models share.

    Raises:
        ConfigError: they do not.
    """
    sizes: dict[str, int] = {}
    if predictions is not None:
        sizes[FULL] = predictions.vocabulary
    for name, predictor in running.items():
        sizes[name] = predictor.vocabulary
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        raise ConfigError(f"These models do not share a vocabulary: {listed}.")
    return min(sizes.values())


def _on_row(
    running: Mapping[str, Predictor],
    tallies: Mapping[str, _Tally],
    tokens: np.ndarray,
    where: np.ndarray,
    stored: TeacherPredictions | None,
) -> None:
    """Add what each model makes of a row to its tally.

    Args:
        running: models by name, the unquantized one first if it runs.
        tallies: by name.
        tokens: of the row, ``(length,)``.
        where: positions whose next token is a target, ``(n,)``.
        stored: the unquantized model's predictions at these targets.
    """
    if not running:
        return
    inputs = mx.array(tokens[None, :-1])
    places = mx.array(where)
    targets = mx.array(tokens[where + 1])
    hidden: dict[str, mx.array] = {}
    for name, predictor in running.items():
        with tallies[name].clock():
            hidden[name] = predictor.hidden(inputs, places)
    chunks: dict[str, list[list[np.ndarray]]] = {name: [] for name in running}
    step = chunk_length(next(iter(running.values())).vocabulary)
    for start in range(0, where.size, step):
        part = slice(start, start + step)
        stored_part = None if stored is None else stored[part]
        full = None
        for name, predictor in running.items():
            with tallies[name].clock():
                log_probs = predictor.log_probs(hidden[name][part])
                if name == FULL:
                    full = log_probs
                scores = _compare(log_probs, targets[part], full, stored_part)
                mx.eval(scores)
                chunks[name].append([np.array(values, np.float64) for values in scores])
    for name, parts in chunks.items():
        tallies[name].add(np.concatenate(values) for values in zip(*parts, strict=True))


def _compare(
    log_probs: mx.array,
    targets: mx.array,
    full: mx.array | None,
    stored: TeacherPredictions | None,
) -> _TargetScores:
    """Return the scores at some targets, lazily.

    Args:
        log_probs: of the model, ``(n, V)``.
        targets: tokens ``(n,)``.
        full: the unquantized model's log-probabilities ``(n, V)``, or None.
        stored: or what was stored of them.
    """
    nll = -mx.take_along_axis(log_probs, targets[:, None], -1)[:, 0]
    likeliest = log_probs.argmax(-1)
    hits = likeliest == targets
    if stored is not None:
        flips = likeliest != mx.array(stored.tokens[:, 0])
        return _TargetScores(nll, hits, _kl_to_stored(log_probs, stored), flips)
    if full is not None:
        kl = (mx.exp(full) * (full - log_probs)).sum(-1)
        return _TargetScores(nll, hits, kl, likeliest != full.argmax(-1))
    unknown = nll * mx.nan
    return _TargetScores(nll, hits, unknown, unknown)


def _kl_to_stored(log_probs: mx.array, stored: TeacherPredictions) -> mx.array:
    """KL between the K likeliest tokens and all others as one outcome, float32 ``(n,)``."""
    tokens = mx.array(stored.tokens)  # (n, K)
    teacher = mx.array(stored.log_probs)
    student = mx.take_along_axis(log_probs, tokens, -1)
    kl = (mx.exp(teacher) * (teacher - student)).sum(-1)
    if stored.is_exact:
        return kl
    without_likeliest = mx.put_along_axis(log_probs, tokens, mx.array(-mx.inf), -1)
    student_tail = logsumexp(without_likeliest)
    teacher_tail = mx.array(stored.tail)
    return kl + mx.exp(teacher_tail) * (teacher_tail - student_tail)


def _check(
    teacher: nn.Module | None,
    students: Mapping[str, nn.Module],
    rows: Sequence[Any],
    predictions: TeacherPredictions | None,
    tokenizer: Any,
    asked: Sequence[Question],
    max_tokens: int,
) -> None:
    """Refuse what cannot be evaluated.

    Raises:
        ConfigError: says what is missing.
    """
    if teacher is None and not students:
        raise ConfigError("There is no model to judge.")
    if FULL in students:
        raise ConfigError(
            f"The column {FULL!r} is the unquantized model's; give it as teacher, or another name."
        )
    if not rows and not asked:
        raise ConfigError("There is nothing to judge by: give rows, prompts or a golden set.")
    if asked and tokenizer is None:
        raise ConfigError("Prompts need a tokenizer.")
    check_whole("max_tokens", max_tokens, 1)
    if predictions is None:
        return
    if not rows or predictions.rows != rows_fingerprint(rows):
        raise ConfigError(
            "The stored predictions belong to other rows; call teacher_predictions with these."
        )


def _notes(
    columns: Sequence[Column], empty: int, predictions: TeacherPredictions | None
) -> tuple[str, ...]:
    """Say what the figures do not."""
    notes = []
    floor = -math.inf if predictions is None else predictions.floor_nats
    if empty:
        notes.append(f"{empty} rows without a target were left out.")
    for column in columns:
        failed = 0
        if column.scores is not None:
            failed = int((~np.isfinite(column.scores.nll)).sum())
        if failed:
            notes.append(
                f"{column.name} gives no numbers on {failed} rows: "
                "its weights or activations overflow."
            )
        elif column.name != FULL and floor > _FLOOR_NOTE * column.kl_nats:
            notes.append(
                f"{column.name}: the floor is over half of the KL, which may be larger; "
                "keep more tokens (keep=)."
            )
    return tuple(notes)
