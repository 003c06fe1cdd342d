"""A golden set: prompts with the answers that are wanted, and how an answer is compared with one.

Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from qlab.errors import ConfigError, DataError, nearest

Match = str | Callable[[str, Any], bool | float]
MATCHES = ("exact", "contains")
_SHOWN = 20  # faults that one message lists
_ANSWERS = ("expected", "completion")


@dataclass(frozen=True)
class Question:
    """One row of a golden set.

    Attributes:
        number: of the row.
        prompt: what is asked.
        expected: what is wanted: text, or whatever a matching function takes.
    """

    number: int
    prompt: str
    expected: Any


def questions(golden: Iterable[Mapping[str, Any]], match: Match) -> tuple[Question, ...]:
    """Check a golden set, all of it.

    Args:
        golden: rows with ``prompt`` and ``expected`` (or ``completion``); other keys are nobody's
            affair.
        match: see ``score``.

    Raises:
        ConfigError: there is no such way to match.
        DataError: rows have faults; the message names each row and key.
    """
    if not callable(match) and (not isinstance(match, str) or match not in MATCHES):
        hint = nearest(match, MATCHES) if isinstance(match, str) else ""
        raise ConfigError(
            f"Unknown match {match!r}; choose one of {', '.join(MATCHES)}, or a function(answer, expected).{hint}"
        )
    if isinstance(golden, (str, bytes, Mapping)) or not isinstance(golden, Iterable):
        raise DataError(
            f"A golden set is a list of rows such as {{'prompt': …, 'expected': …}}, not {type(golden).__name__}."
        )
    rows = list(golden)
    faults = [
        f"row {n}: {fault}" for n, row in enumerate(rows) if (fault := _fault(row, callable(match)))
    ]
    if faults:
        more = f" (and {len(faults) - _SHOWN} more)" if len(faults) > _SHOWN else ""
        raise DataError(
            f"{len(faults)} of {len(rows)} golden rows have faults: "
            + "; ".join(faults[:_SHOWN])
            + more
            + "."
        )
    return tuple(Question(n, row["prompt"], row[_answer_key(row)]) for n, row in enumerate(rows))


def score(answer: str, question: Question, match: Match) -> float:
    """Return how right an answer is, 0 to 1.

    Args:
        answer: what the model wrote.
        question: what was asked.
        match: ``exact`` (equal but for white space around), ``contains`` (the expected text occurs
            in the answer), both minding case, or a function of answer and expected that returns
            True, False, or a number from 0 to 1.

    Raises:
        DataError: the function failed or returned something else; names the row.
    """
    if match == "exact":
        return float(answer.strip() == question.expected.strip())
    if match == "contains":
        return float(question.expected.strip() in answer)
    try:
        found: Any = match(answer, question.expected)  # type: ignore
        value = float(found) if not isinstance(found, (str, bytes)) else float("nan")
    except Exception as error:
        raise DataError(
            f"Golden row {question.number}: the matching function failed: {error!r}."
        ) from error
    if not isfinite(value) or not 0 <= value <= 1:
        raise DataError(
            f"Golden row {question.number}: the matching function returned {found!r}; True, False or 0 to 1 is legal."
        )
    return value


def _answer_key(row: Mapping[str, Any]) -> str:
    return next(key for key in _ANSWERS if row.get(key) is not None)


def _fault(row: Any, free: bool) -> str:
    """What is wrong with a row, in words, or an empty string.

    ``free`` where any expected value will do.
    """
    if not isinstance(row, Mapping):
        return f"it is {type(row).__name__}, not a dict"
    given = [key for key in _ANSWERS if row.get(key) is not None]
    prompt = row.get("prompt")
    if prompt is None:
        return f"no 'prompt'; its keys are {', '.join(map(repr, row)) or 'none'}"
    if not isinstance(prompt, str) or not prompt.strip():
        return (
            f"'prompt' is {'empty' if isinstance(prompt, str) else type(prompt).__name__}, not text"
        )
    if len(given) != 1:
        return (
            "both 'expected' and 'completion'; keep one"
            if given
            else "no 'expected' (or 'completion')"
        )
    expected = row[given[0]]
    if not free and (not isinstance(expected, str) or not expected.strip()):
        return f"{given[0]!r} is {'empty' if isinstance(expected, str) else type(expected).__name__}, not text"
    return ""
