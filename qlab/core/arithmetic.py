"""Whole-number arithmetic that several rooms need."""

from __future__ import annotations


def ceil_div(number: int, divisor: int) -> int:
    """Return number / divisor, rounded up to a whole number.

    Example:
        >>> ceil_div(9, 4), ceil_div(8, 4)
        (3, 2)
    """
    return -(-number // divisor)


def round_up(number: int, multiple: int) -> int:
    """Return the smallest multiple that is not less than a number.

    Example:
        >>> round_up(9, 4), round_up(8, 4)
        (12, 8)
    """
    return ceil_div(number, multiple) * multiple
