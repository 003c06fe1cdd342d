"""A golden set: prompts with the answers that are wanted, and how an answer is compared with one.

``engine.evaluate.judge`` checks a set with ``questions``, and ``answers`` scores with ``score``.
It knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, cast

from qlab.errors import ConfigError, DataError, nearest

MatchFunction = Callable[[str, Any], bool | float]
Match = str | MatchFunction
MATCHES = ("exact", "contains")
_SHOWN = 20  # faults that one message lists
_ANSWER_KEYS = ("expected", "completion")


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

    Example:
        >>> questions([{"prompt": "2 + 2 =", "expected": "4"}], "contains")
        (Question(number=0, prompt='2 + 2 =', expected='4'),)

    Args:
        golden: rows with ``prompt`` and ``expected`` (or ``completion``); other keys are ignored.
        match: see ``score``.

    Raises:
        ConfigError: there is no such way to match.
        DataError: rows have faults; the message names each row and key.
    """
    _check_match(match)
    if isinstance(golden, (str, bytes, Mapping)) or not isinstance(golden, Iterable):
        raise DataError(
            "A golden set is a list of rows such as {'prompt': …, 'expected': …}, "
            f"not {type(golden).__name__}."
        )
    rows = list(golden)
    faults = []
    for number, row in enumerate(rows):
        fault = _fault(row, any_answer=callable(match))
        if fault:
            faults.append(f"row {number}: {fault}")
    if faults:
        shown = "; ".join(faults[:_SHOWN])
        hidden = len(faults) - _SHOWN
        more = f" (and {hidden} more)" if hidden > 0 else ""
        raise DataError(f"{len(faults)} of {len(rows)} golden rows have faults: {shown}{more}.")
    return tuple(
        Question(number, row["prompt"], row[_answer_keys(row)[0]])
        for number, row in enumerate(rows)
    )


def _check_match(match: Any) -> None:
    if callable(match) or (isinstance(match, str) and match in MATCHES):
        return
    hint = nearest(match, MATCHES) if isinstance(match, str) else ""
    raise ConfigError(
        f"Unknown match {match!r}; choose one of {', '.join(MATCHES)}, "
        f"or a function(answer, expected).{hint}"
    )


def score(answer: str, question: Question, match: Match) -> float:
    """Return how right an answer is, 0 to 1.

    Args:
        answer: what the model wrote.
        question: what was asked.
        match: ``exact`` (equal but for white space around), ``contains`` (the expected text occurs
            in the answer), both minding case, or a function of answer and expected answer that
            returns True, False, or a number from 0 to 1.

    Raises:
        DataError: the function failed or returned something else; names the row.
    """
    if match == "exact":
        return float(answer.strip() == question.expected.strip())
    if match == "contains":
        return float(question.expected.strip() in answer)
    result: Any = None
    try:
        result = cast(MatchFunction, match)(answer, question.expected)
        value = float("nan") if isinstance(result, (str, bytes)) else float(result)
    except Exception as error:
        raise DataError(
            f"Golden row {question.number}: the matching function failed: {error!r}."
        ) from error
    if not isfinite(value) or not 0 <= value <= 1:
        raise DataError(
            f"Golden row {question.number}: the matching function returned {result!r}; "
            "True, False or 0 to 1 is legal."
        )
    return value


def _answer_keys(row: Mapping[str, Any]) -> list[str]:
    """Return the keys of a row that hold an expected answer."""
    return [key for key in _ANSWER_KEYS if row.get(key) is not None]


def _fault(row: Any, any_answer: bool) -> str:
    """Return what is wrong with a row, in words, or an empty string.

    Args:
        row: of the golden set.
        any_answer: whether the expected answer may be other than text.
    """
    if not isinstance(row, Mapping):
        return f"it is {type(row).__name__}, not a dict"
    prompt = row.get("prompt")
    if prompt is None:
        keys = ", ".join(map(repr, row)) or "none"
        return f"no 'prompt'; its keys are {keys}"
    if not _is_text(prompt):
        return f"'prompt' is {_what_it_is(prompt)}, not text"
    keys = _answer_keys(row)
    if not keys:
        return "no 'expected' (or 'completion')"
    if len(keys) > 1:
        return "both 'expected' and 'completion'; keep one"
    expected = row[keys[0]]
    if not any_answer and not _is_text(expected):
        return f"{keys[0]!r} is {_what_it_is(expected)}, not text"
    return ""


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _what_it_is(value: Any) -> str:
    return "empty" if isinstance(value, str) else type(value).__name__
