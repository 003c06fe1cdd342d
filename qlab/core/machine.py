"""Budgets and verdicts: whether so many bytes fit into a machine. Knows no model."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from qlab.core.display import size_text
from qlab.errors import ConfigError


@dataclass(frozen=True)
class Machine:
    """The memory that a model must fit into.

    Attributes:
        label: what to call it, such as ``this machine, 25.2 GB``.
        total_nbytes: memory that the device may use.
        free_nbytes: the part of it that is free now.
    """

    label: str
    total_nbytes: int
    free_nbytes: int


_GIB = 2**30
_CARD_SHARE = 0.97  # what a driver leaves of a card's memory
# recommended working set of unified memory, Apple's defaults: two thirds below 36 GiB, else 3/4
_LARGE_MAC_GIB = 36
_SMALL_MAC_SHARE = 2 / 3
_LARGE_MAC_SHARE = 3 / 4
_UNITS = {"gb": 1e9, "gib": _GIB, "mb": 1e6, "mib": 2**20}
_NAME = re.compile(
    r"\s*(?P<amount>\d+(?:\.\d+)?)\s*(?P<unit>gb|gib|mb|mib)\s*(?P<kind>mac|card)?\s*",
    re.IGNORECASE,
)
_BACKENDS = {"mac": "metal", "card": "cuda"}


def budget(wanted: float | int | str | Machine) -> Machine:
    """Return a budget as a machine.

    Example:
        >>> budget("16 GB Mac").free_nbytes
        11453246122

    Args:
        wanted: bytes; a machine; or a name: ``"16 GB Mac"`` (its default working set: two thirds of
            the memory, three quarters from 36 GB on), ``"24 GB card"`` (less what a driver keeps),
            ``"10 GB"`` (exactly that).

    Raises:
        ConfigError: none of these, or not above zero.
    """
    if isinstance(wanted, Machine):
        return wanted
    if isinstance(wanted, str):
        nbytes = _named_nbytes(wanted)
        label = wanted.strip()
    elif isinstance(wanted, (int, float)) and not isinstance(wanted, bool):
        nbytes = wanted
        label = size_text(max(wanted, 0))
    else:
        raise ConfigError(
            f"budget={wanted!r} is not legal; give bytes, a machine, or a name such as '16 GB Mac'."
        )
    if not 0 < nbytes < math.inf:
        raise ConfigError(f"budget={wanted!r} is not legal; it must be above 0 bytes.")
    return Machine(label, int(nbytes), int(nbytes))


def _named_nbytes(name: str) -> float:
    """Return the bytes that a budget such as ``16 GB Mac`` has."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ConfigError(
            f'budget={name!r} is not legal; write "16 GB Mac", "24 GB card", "10 GB" '
            "or a number of bytes."
        )
    amount = float(match["amount"])
    kind = (match["kind"] or "").lower()
    if kind == "mac":
        share = _SMALL_MAC_SHARE if amount < _LARGE_MAC_GIB else _LARGE_MAC_SHARE
        return amount * _GIB * share
    if kind == "card":
        return amount * _GIB * _CARD_SHARE
    return amount * _UNITS[match["unit"].lower()]


def backend_notes(machine: Machine, backend: str) -> tuple[str, ...]:
    """Return a note if the budget names another backend than the one the estimate is for.

    Args:
        machine: the budget.
        backend: ``metal``, ``cuda`` or ``cpu``: where the estimated step runs.
    """
    match = _NAME.fullmatch(machine.label)
    kind = (match["kind"] or "").lower() if match else ""
    if _BACKENDS.get(kind, backend) == backend:
        return ()
    limit = f"{machine.label} is only the limit"
    return (f"{limit}: the step is predicted as this machine's back end ({backend}) takes it.",)


@dataclass(frozen=True)
class Verdict:
    """Whether something fits.

    Attributes:
        word: ``fits`` (even at the upper end of the band), ``tight`` (the expected value does, the
            upper end does not) or ``does not fit``.
        margin_nbytes: budget less expected peak; negative where it does not fit.
        reason: one sentence.
        machine: the budget.
    """

    word: str
    margin_nbytes: int
    reason: str
    machine: Machine

    def __bool__(self) -> bool:
        return self.word != "does not fit"

    def __str__(self) -> str:
        return f"{self.word}: {self.reason}"


def verdict(expected: int, high: int, largest: str, machine: Machine) -> Verdict:
    """Judge a peak against a machine's free memory.

    Args:
        expected: bytes.
        high: upper end of the band, bytes.
        largest: the largest part, in words.
        machine: the budget.
    """
    free = machine.free_nbytes
    margin = free - expected
    used = f"{size_text(expected)} of {size_text(free)}"
    if high <= free:
        return Verdict("fits", margin, f"{used}, {size_text(margin)} to spare.", machine)
    if expected <= free:
        reason = f"{used}, but it may take up to {size_text(high)}."
        return Verdict("tight", margin, reason, machine)
    excess = f"{size_text(-margin)} more than the {size_text(free)} at hand"
    reason = f"{size_text(expected)} are {excess}; most of it is {largest}."
    if expected <= machine.total_nbytes:
        whole = f"the {size_text(machine.total_nbytes)} of {machine.label}"
        reason += f" It would fit if other programs left {whole} free."
    return Verdict("does not fit", margin, reason, machine)
