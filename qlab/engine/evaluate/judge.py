"""Judges models side by side.

Likelihood of what is right, distance from the unquantized model, answers to prompts.

Only target tokens count: what a row says before is what the model is told, not what it must know.
Knows no scheme and no adapter: it is given models, and runs them one row at a time.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import nan
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from qlab.core.config.legal import check_whole
from qlab.core.evaluate.judge import COLUMNS, Column, JudgeReport, Sample, Scores
from qlab.core.progress import Progress
from qlab.engine.evaluate.generate import answer
from qlab.engine.evaluate.golden import Match, Question, questions, score
from qlab.engine.evaluate.predict import Predictor, chunk_length
from qlab.engine.evaluate.teacher import Kept, check_tokens, checked, rows_fingerprint, spots
from qlab.engine.models.surgery import twin
from qlab.errors import ConfigError

FULL = COLUMNS[0]
_FLOOR_NOTE = 0.5  # share of a KL that its floor may be before the report warns


def judge(
    teacher: nn.Module | None,
    students: Mapping[str, nn.Module],
    rows: Sequence[Any] = (),
    *,
    kept: Kept | None = None,
    tokenizer: Any = None,
    prompts: Iterable[str] = (),
    golden: Iterable[Mapping[str, Any]] = (),
    match: Match = "exact",
    max_tokens: int = 64,
) -> Generator[Progress, None, JudgeReport]:
    """Judge models by rows held out, by a golden set, and let them answer prompts.

    Args:
        teacher: the unquantized model, in the first column; None if it is not in memory.
        students: models by name of column, such as ``quantized`` and ``quantized + adapter``.
        rows: objects with ``tokens`` and ``mask`` (``core.train.rows``), not trained on.
        kept: what ``engine.evaluate.teacher.remember`` returned for these rows: then the teacher
            does not run on them.
        tokenizer: mlx-lm's wrapper; needed for prompts and golden sets.
        prompts: each model answers them, greedily.
        golden: prompts with expected answers, see ``engine.evaluate.golden.questions``.
        match: see ``engine.evaluate.golden.score``.
        max_tokens: longest answer.

    Yields:
        Progress after each row and each token of an answer.

    Raises:
        ConfigError: nothing to judge, or by nothing; ``kept`` belongs to other rows; vocabularies
            differ.
        DataError: rows or golden set have faults.
    """
    start = time.perf_counter()
    given = [rows] if isinstance(rows, str) else list(rows)
    good = checked(given)
    asked = _asked(prompts, questions(golden, match))
    _check(teacher, students, good, kept, tokenizer, asked, max_tokens)
    models = {**({FULL: teacher} if teacher is not None else {}), **students}
    tallies = {name: _Tally() for name in ([FULL, *students] if kept is not None else models)}
    if good:
        yield from _on_rows(models, tallies, good, kept)
    texts = yield from _answers(models, tokenizer, asked, max_tokens, tallies)
    samples = tuple(
        _sample(item, [texts.get((name, n)) for name in tallies], match)
        for n, item in enumerate(asked)
    )
    columns = []
    for i, (name, tally) in enumerate(tallies.items()):
        marks = [s.scores[i] for s in samples if s.scores] if name in models else []
        columns.append(Column.of(name, tally.scores() if good else None, marks, tally.seconds))
    has_full = FULL in tallies and good
    return JudgeReport(
        columns=tuple(columns),
        samples=samples,
        rows=len(good),
        targets=sum(spots(row).size for row in good),
        teacher=(kept.words if kept else "exact") if has_full else "",
        floor_nats=kept.floor_nats if kept else 0.0,
        seconds=time.perf_counter() - start,
        notes=_notes(columns, len(given) - len(good), kept),
    )


@dataclass
class _Tally:
    """What one model collects, a list of float64 arrays each, one array a row."""

    nll: list[np.ndarray] = field(default_factory=list)
    hits: list[np.ndarray] = field(default_factory=list)
    kl: list[np.ndarray] = field(default_factory=list)
    flips: list[np.ndarray] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, nll: Any, hits: Any, kl: Any, flips: Any) -> None:
        for found, values in zip(
            (self.nll, self.hits, self.kl, self.flips), (nll, hits, kl, flips), strict=True
        ):
            found.append(np.array(values, np.float64))

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Count the time within."""
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start

    def scores(self) -> Scores:
        sums = [
            np.array([part.sum() for part in parts])
            for parts in (self.nll, self.hits, self.kl, self.flips)
        ]
        each = np.concatenate(self.kl)
        targets = np.array([part.size for part in self.nll], np.float64)
        return Scores(targets, *sums, kl_each=each if not np.isnan(each).all() else each[:0])


def _on_rows(
    models: dict[str, nn.Module], tallies: dict[str, _Tally], rows: list[Any], kept: Kept | None
) -> Generator[Progress, None, None]:
    """Fill the tallies, a row at a time; of every model one chunk of logits exists at once."""
    running = {
        name: Predictor(module) for name, module in models.items() if kept is None or name != FULL
    }
    sizes = {
        **({FULL: kept.vocabulary} if kept is not None else {}),
        **{n: p.vocabulary for n, p in running.items()},
    }
    if len(set(sizes.values())) > 1:
        raise ConfigError(
            f"These models do not share a vocabulary: {', '.join(f'{n} has {s}' for n, s in sizes.items())}."
        )
    check_tokens(rows, min(sizes.values()))
    before = 0
    for number, row in enumerate(rows):
        where = spots(row)
        tokens = np.asarray(row.tokens, np.int32)
        part = kept[before : before + where.size] if kept is not None else None
        if part is not None:
            none = np.zeros(where.size)
            tallies[FULL].add(part.nll, part.tokens[:, 0] == tokens[where + 1], none, none)
        _row(running, tallies, tokens, where, part)
        before += where.size
        yield Progress("judging", number + 1, len(rows))


def _row(
    running: dict[str, Predictor],
    tallies: dict[str, _Tally],
    tokens: np.ndarray,
    where: np.ndarray,
    kept: Kept | None,
) -> None:
    """Add what each model makes of a row to its tally."""
    inputs = mx.array(tokens[None, :-1])
    places = mx.array(where)
    targets = mx.array(tokens[where + 1])
    hidden: dict[str, mx.array] = {}
    found: dict[str, list[list[np.ndarray]]] = {name: [] for name in running}
    for name, predictor in running.items():
        with tallies[name].clock():
            hidden[name] = predictor.hidden(inputs, places)
    step = chunk_length(next(iter(running.values())).vocabulary) if running else where.size
    for start in range(0, where.size, step):
        part = slice(start, start + step)
        full = None
        for name, predictor in running.items():
            with tallies[name].clock():
                own = predictor.log_probs(hidden[name][part])
                full = own if name == FULL else full
                values = _compare(
                    own, targets[part], full, kept[part] if kept is not None else None
                )
                mx.eval(values)
                found[name].append([np.array(v, np.float64) for v in values])
    for name, chunks in found.items():
        tallies[name].add(*(np.concatenate(values) for values in zip(*chunks, strict=True)))


def _compare(
    own: mx.array, targets: mx.array, full: mx.array | None, kept: Kept | None
) -> list[mx.array]:
    """Return nll, hits, KL(full ‖ own) and flips at each position, lazily.

    NaN where there is nothing to compare with.

    Args:
        own: log-probabilities ``(n, V)``.
        targets: tokens ``(n,)``.
        full: the unquantized model's log-probabilities, or None.
        kept: or what was kept of them.
    """
    nll = -mx.take_along_axis(own, targets[:, None], -1)[:, 0]
    top = own.argmax(-1)
    if kept is not None:
        kl = _kl_to_kept(own, kept)
        likeliest = mx.array(kept.tokens[:, 0])
    elif full is not None:
        kl = (mx.exp(full) * (full - own)).sum(-1)
        likeliest = full.argmax(-1)
    else:
        return [nll, top == targets, nll * mx.nan, nll * mx.nan]
    return [nll, top == targets, kl, top != likeliest]


def _kl_to_kept(own: mx.array, kept: Kept) -> mx.array:
    """KL between the K likeliest tokens and the rest as one, float32 ``(n,)``."""
    tokens = mx.array(kept.tokens)
    log_probs = mx.array(kept.log_probs)
    tail = mx.array(kept.tail)
    kl = (mx.exp(log_probs) * (log_probs - mx.take_along_axis(own, tokens, -1))).sum(-1)
    if kept.tokens.shape[1] == kept.vocabulary:
        return kl
    others = mx.logsumexp(mx.put_along_axis(own, tokens, mx.array(-mx.inf), -1), -1)
    return kl + mx.exp(tail) * (tail - others)


def _asked(prompts: Iterable[str], golden: tuple[Question, ...]) -> list[Question]:
    """Prompts without an expected answer, then the golden set."""
    some = [prompts] if isinstance(prompts, str) else list(prompts)
    for number, prompt in enumerate(some):
        if not isinstance(prompt, str) or not prompt:
            raise ConfigError(f"Prompt {number} is {prompt!r}; a prompt is text.")
    return [*(Question(n, prompt, None) for n, prompt in enumerate(some)), *golden]


def _answers(
    models: dict[str, nn.Module],
    tokenizer: Any,
    asked: list[Question],
    max_tokens: int,
    tallies: dict[str, _Tally],
) -> Generator[Progress, None, dict[tuple[str, int], str]]:
    """Let every model answer every prompt; return answers by name and number."""
    texts: dict[tuple[str, int], str] = {}
    for name, module in models.items() if asked else ():
        speaker = twin(module)
        speaker.eval()
        known = Predictor(module).vocabulary
        for number, question in enumerate(asked):
            with tallies[name].clock():
                texts[name, number] = yield from _told(
                    answer(speaker, tokenizer, question.prompt, max_tokens, known),
                    Progress(f"{name} answers", number, len(asked)),
                )
    if asked:
        yield Progress("answers", len(asked), len(asked))
    return texts


def _told(writing: Generator[int, None, str], progress: Progress) -> Generator[Progress, None, str]:
    """Say how far an answer is, at each of its tokens, so that it can be stopped there."""
    while True:
        try:
            next(writing)
        except StopIteration as end:
            return end.value
        yield progress


def _sample(question: Question, texts: list[str | None], match: Match) -> Sample:
    shown = tuple(text or "" for text in texts)
    if question.expected is None:
        return Sample(question.prompt, shown)
    scores = tuple(score(text, question, match) if text is not None else nan for text in texts)
    return Sample(question.prompt, shown, str(question.expected), scores)


def _check(
    teacher: nn.Module | None,
    students: Mapping[str, nn.Module],
    rows: list[Any],
    kept: Kept | None,
    tokenizer: Any,
    asked: list[Question],
    max_tokens: int,
) -> None:
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
    if kept is not None and (not rows or kept.rows != rows_fingerprint(rows)):
        raise ConfigError(
            "The kept predictions belong to other rows; call remember again with these."
        )


def _notes(columns: list[Column], empty: int, kept: Kept | None) -> tuple[str, ...]:
    """Say what the figures do not."""
    found = [f"{empty} rows without a target were left out."] if empty else []
    for column in columns:
        if column.scores is not None and not np.isfinite(column.scores.nll).all():
            bad = int((~np.isfinite(column.scores.nll)).sum())
            found.append(
                f"{column.name} gives no numbers on {bad} rows: its weights or activations overflow."
            )
        elif kept and column.name != FULL and kept.floor_nats > _FLOOR_NOTE * column.kl_nats:
            found.append(
                f"{column.name}: the floor is over half of the KL, which may be larger; keep more tokens (keep=)."
            )
    return tuple(found)
