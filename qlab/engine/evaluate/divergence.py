"""Compares a changed model with the original on held-out text: KL, perplexity, top-token flips.

``ModelMeasurements`` calls this for a plan (``compare_on_text``) and for single layers
(``layer_kl``). Models side by side on rows with targets are ``engine.evaluate.judge``'s.

Shapes: T tokens in a row, V words in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from qlab.core.evaluate.text import EvalReport
from qlab.core.progress import Progress
from qlab.ops.sums import logsumexp

Batches = Sequence[mx.array]


class _TokenScores(NamedTuple):
    """What is collected at each token, ``(T,)`` each; the last token of a row has no target."""

    kl: mx.array
    flips: mx.array
    nll: mx.array
    nll_before: mx.array


def log_probs(model: nn.Module, tokens: mx.array) -> mx.array:
    """Return log-probabilities of the next token at every position, float32 ``(T, V)``.

    Args:
        model: an mlx-lm model.
        tokens: token ids ``(1, T)``.
    """
    outputs = model(tokens)[0]
    logits = outputs.astype(mx.float32)
    normalizer = logsumexp(logits, keepdims=True)
    return logits - normalizer


def kl_per_token(teacher: mx.array, student: mx.array) -> mx.array:
    """Return KL(teacher ‖ student) = Σ p·(log p − log q) in nats at every position.

    Args:
        teacher: log-probabilities ``(T, V)``.
        student: log-probabilities ``(T, V)``.

    Returns:
        float32 ``(T,)``.
    """
    probabilities = mx.exp(teacher)
    terms = probabilities * (teacher - student)
    return terms.sum(-1)


def compare_on_text(
    teacher: nn.Module, student: nn.Module, batches: Batches
) -> Generator[Progress, None, EvalReport]:
    """Compare two models on text, a row at a time, so that only two rows of logits exist at once.

    Args:
        teacher: the original.
        student: the changed model.
        batches: token ids ``(1, T)``.

    Yields:
        Progress after each row.
    """
    rows: list[list[np.ndarray]] = []
    for done, tokens in enumerate(batches, 1):
        scores = _row_scores(teacher, student, tokens)
        rows.append(scores)
        yield Progress("comparing with the original", done, len(batches))
    fields = zip(*rows, strict=True)
    kl, flips, nll, nll_before = map(np.concatenate, fields)
    return EvalReport.from_tokens(kl, flips, nll, nll_before)


def _row_scores(teacher: nn.Module, student: nn.Module, tokens: mx.array) -> list[np.ndarray]:
    """Return the fields of ``_TokenScores`` of one row, float64."""
    p = log_probs(teacher, tokens)
    q = log_probs(student, tokens)
    targets = tokens[0, 1:, None]  # (T−1, 1): the token that each position should predict
    scores = _TokenScores(
        kl=kl_per_token(p, q),
        flips=p.argmax(-1) != q.argmax(-1),
        nll=_losses(q, targets),
        nll_before=_losses(p, targets),
    )
    mx.eval(scores)
    return [np.array(values, np.float64) for values in scores]


def _losses(log_probabilities: mx.array, targets: mx.array) -> mx.array:
    """Return the loss at every position but the last, ``(T−1,)``."""
    before_target = log_probabilities[:-1]
    of_targets = mx.take_along_axis(before_target, targets, -1)
    return -of_targets[:, 0]


def layer_kl(
    teacher: nn.Module, students: Mapping[str, nn.Module], batches: Batches
) -> Generator[Progress, None, dict[str, float]]:
    """Measure the true KL of several changed models; the teacher runs once per row.

    Args:
        teacher: the original.
        students: by name, models that share the teacher's arrays but for one layer.
        batches: token ids ``(1, T)``.

    Yields:
        Progress after each student and row.

    Returns:
        Mean KL in nats per token, by name.
    """
    sums = dict.fromkeys(students, 0.0)
    total = len(students) * len(batches)
    done = 0
    count = 0
    for tokens in batches:
        p = log_probs(teacher, tokens)
        mx.eval(p)
        count += tokens.size
        for name, student in students.items():
            q = log_probs(student, tokens)
            kl = kl_per_token(p, q).sum()
            sums[name] += float(np.array(kl))
            done += 1
            yield Progress("true KL, layer by layer", done, total)
    return {name: nats / count for name, nats in sums.items()}
