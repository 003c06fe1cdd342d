"""Judges a changed model against the original.

KL divergence, perplexity, top-token flips, on held-out text.

Knows no scheme: it compares two models.
"""

from __future__ import annotations

from collections.abc import Generator

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from qlab.core.evaluate.text import EvalReport
from qlab.core.progress import Progress


def log_probs(model: nn.Module, tokens: mx.array) -> mx.array:
    """Return log-probabilities of the next token at every position, float32 ``(T, V)``."""
    logits = model(tokens)[0].astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def kl_per_token(teacher: mx.array, student: mx.array) -> mx.array:
    """KL(teacher ‖ student) in nats at every position, float32 ``(T,)``, from log-probabilities
    ``(T, V)``.
    """
    return (mx.exp(teacher) * (teacher - student)).sum(-1)


def evaluate(
    teacher: nn.Module,
    student: nn.Module,
    batches: list[mx.array],
    what: str = "comparing with the original",
) -> Generator[Progress, None, EvalReport]:
    """Compare two models on text, a row at a time, so that only two rows of logits exist at once.

    Args:
        teacher: the original.
        student: the changed model.
        batches: token ids ``(1, T)``.
        what: words for the progress line.

    Yields:
        Progress after each row.
    """
    kl = []
    flips = []
    nll = []
    nll_teacher = []
    for i, tokens in enumerate(batches):
        p = log_probs(teacher, tokens)
        q = log_probs(student, tokens)
        target = tokens[0, 1:, None]
        row = (
            kl_per_token(p, q),
            p.argmax(-1) != q.argmax(-1),
            -mx.take_along_axis(q[:-1], target, -1)[:, 0],
            -mx.take_along_axis(p[:-1], target, -1)[:, 0],
        )
        mx.eval(row)
        for found, values in zip((kl, flips, nll, nll_teacher), row, strict=True):
            found.append(np.array(values, np.float64))
        del p, q
        yield Progress(what, i + 1, len(batches))
    return EvalReport.from_tokens(*(np.concatenate(v) for v in (kl, flips, nll, nll_teacher)))


def layer_kl(
    teacher: nn.Module, students: dict[str, nn.Module], batches: list[mx.array]
) -> Generator[Progress, None, dict[str, float]]:
    """True KL of several changed models, the teacher's pass made once per row.

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
    count = 0
    for i, tokens in enumerate(batches):
        p = log_probs(teacher, tokens)
        mx.eval(p)
        count += tokens.size
        for j, (name, student) in enumerate(students.items()):
            sums[name] += kl_per_token(p, log_probs(student, tokens)).sum().item()
            yield Progress(
                "true KL, layer by layer", i * len(students) + j + 1, len(students) * len(batches)
            )
    return {name: total / count for name, total in sums.items()}
