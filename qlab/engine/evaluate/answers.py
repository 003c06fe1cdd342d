"""Models answer prompts and golden questions; ``engine.evaluate.judge`` puts them side by side."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from math import nan
from typing import Any

import mlx.nn as nn

from qlab.core.evaluate.judge import Sample
from qlab.core.progress import Progress
from qlab.engine.evaluate.generate import answer
from qlab.engine.evaluate.golden import Match, Question, score
from qlab.engine.evaluate.predict import Predictor
from qlab.engine.models.surgery import twin
from qlab.errors import ConfigError


def asked_questions(prompts: Iterable[str], golden: Sequence[Question]) -> list[Question]:
    """Return prompts as questions without an expected answer, then the golden set.

    Raises:
        ConfigError: a prompt is no text, or empty.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    for number, prompt in enumerate(texts):
        if not isinstance(prompt, str) or not prompt:
            raise ConfigError(f"Prompt {number} is {prompt!r}; a prompt is text.")
    plain = [Question(number, prompt, None) for number, prompt in enumerate(texts)]
    return [*plain, *golden]


def answers_of(
    module: nn.Module, name: str, tokenizer: Any, asked: Sequence[Question], max_tokens: int
) -> Generator[Progress, None, list[str]]:
    """Let a model answer every question; it can be stopped at each token.

    Args:
        module: an mlx-lm model; it is not changed.
        name: of its column, for the progress line.
        tokenizer: mlx-lm's wrapper.
        asked: the questions.
        max_tokens: longest answer.
    """
    speaker = twin(module)
    speaker.eval()
    vocabulary = Predictor(module).vocabulary
    texts = []
    for number, question in enumerate(asked):
        progress = Progress(f"{name} answers", number, len(asked))
        writing = answer(speaker, tokenizer, question.prompt, max_tokens, vocabulary)
        texts.append((yield from _with_progress(writing, progress)))
    return texts


def _with_progress(
    writing: Generator[int, None, str], progress: Progress
) -> Generator[Progress, None, str]:
    """Yield the same progress at each token of an answer; return the answer."""
    while True:
        try:
            next(writing)
        except StopIteration as end:
            return end.value
        yield progress


def samples_of(
    asked: Sequence[Question],
    answers: Mapping[str, Sequence[str]],
    names: Iterable[str],
    match: Match,
) -> tuple[Sample, ...]:
    """Return what every model answered, question by question, with scores.

    Args:
        asked: the questions.
        answers: texts in the order of the questions, by name of model.
        names: the columns; those without answers were not in memory.
        match: see ``golden.score``.
    """
    columns = [answers.get(name) for name in names]
    samples = []
    for number, question in enumerate(asked):
        texts = [None if column is None else column[number] for column in columns]
        samples.append(_sample(question, texts, match))
    return tuple(samples)


def _sample(question: Question, texts: Sequence[str | None], match: Match) -> Sample:
    shown = tuple(text or "" for text in texts)
    if question.expected is None:
        return Sample(question.prompt, shown)
    scores = tuple(nan if text is None else score(text, question, match) for text in texts)
    return Sample(question.prompt, shown, str(question.expected), scores)
