"""Checks of single settings, each with a refusal that names the setting and what it may be.

Every config calls them while it is built; the engine and the lab call them for arguments of their
own. The messages all read ``rank=0 is not legal; it is a whole number, 1 or more.``
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from math import isfinite
from typing import Any

from qlab.errors import ConfigError, nearest


def is_whole(value: Any, least: int | None = None) -> bool:
    """Whether a value is a whole number, and not below the least one.

    ``True`` and ``False`` are none, although Python counts them as integers.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        return False
    return least is None or value >= least


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; ``True`` and ``False`` are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, int) or isfinite(value)


def check_whole(name: str, value: Any, least: int) -> None:
    """Refuse a value that is not a whole number, or below the least one.

    Args:
        name: of the setting, as the user wrote it.
        value: to check.
        least: smallest legal value.

    Raises:
        ConfigError: names the setting, its value and what is legal. So do the other checks.
    """
    if not is_whole(value, least):
        raise ConfigError(f"{name}={value!r} is not legal; it is a whole number, {least} or more.")


def check_number(name: str, value: Any, what: str, legal: Callable[[float], bool]) -> None:
    """Refuse a value that is not a finite number, or not a legal one.

    Args:
        name: of the setting.
        value: to check.
        what: the legal numbers in words, such as ``a number above 0``.
        legal: whether a number is one of them.
    """
    if not is_number(value) or not legal(value):
        raise ConfigError(f"{name}={value!r} is not legal; it is {what}.")


def check_flag(name: str, value: Any) -> None:
    """Refuse a value that is not ``True`` or ``False``."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r} is not legal; it is True or False.")


def check_choice(name: str, value: Any, legal: Collection[str]) -> None:
    """Refuse a value that is not one of some words; the refusal lists them and the nearest."""
    if not isinstance(value, str) or value not in legal:
        raise ConfigError(
            f"{name}={value!r} is not legal; choose one of {', '.join(legal)}."
            f"{nearest(value, legal)}"
        )
