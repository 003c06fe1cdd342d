"""What a setting may be: checks of single values, each with its own clear refusal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import isfinite
from typing import Any

from qlab.errors import ConfigError, nearest


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}={value!r} is not legal; it is a whole number, {least} or more.")


def _flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r} is not legal; it is True or False.")


def _choice(name: str, value: Any, legal: Iterable[str]) -> None:
    if not isinstance(value, str) or value not in legal:
        raise ConfigError(
            f"{name}={value!r} is not legal; choose one of {', '.join(legal)}.{nearest(value, legal)}"
        )


def _number(name: str, value: Any, what: str, legal: Callable[[float], bool]) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not isfinite(value)
        or not legal(value)
    ):
        raise ConfigError(f"{name}={value!r} is not legal; it is {what}.")
