"""Budgets and verdicts: whether so many bytes fit into a machine. Knows no model."""

from __future__ import annotations

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
_CARD_SHARE = 0.97  # what a driver leaves of a card
_MAC_SHARES = (
    (36, 2 / 3),
    (float("inf"), 3 / 4),
)  # recommended working set of unified memory, by GiB (Apple's defaults)
_UNITS = {"gb": 1e9, "gib": _GIB, "mb": 1e6, "mib": 2**20}
_FORM = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(gb|gib|mb|mib)\s*(mac|card)?\s*", re.IGNORECASE)


def budget(wanted: float | int | str | Machine) -> Machine:
    """Return a budget as a machine.

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
        found = _FORM.fullmatch(wanted)
        if not found:
            raise ConfigError(
                f'budget={wanted!r} is not legal; write "16 GB Mac", "24 GB card", "10 GB" or a number of bytes.'
            )
        amount = float(found[1])
        unit = found[2].lower()
        kind = (found[3] or "").lower()
        nbytes = amount * _UNITS[unit]
        if kind == "mac":
            nbytes = amount * _GIB * next(share for size, share in _MAC_SHARES if amount < size)
        elif kind == "card":
            nbytes = amount * _GIB * _CARD_SHARE
        label = wanted.strip()
    elif isinstance(wanted, (int, float)) and not isinstance(wanted, bool):
        nbytes = wanted
        label = size_text(max(wanted, 0))
    else:
        raise ConfigError(
            f"budget={wanted!r} is not legal; give bytes, a machine, or a name such as '16 GB Mac'."
        )
    if not 0 < nbytes < float("inf"):
        raise ConfigError(f"budget={wanted!r} is not legal; it must be above 0 bytes.")
    return Machine(label, int(nbytes), int(nbytes))


def foreign(machine: Machine, backend: str) -> tuple[str, ...]:
    """Say so where a budget is that of another kind of machine than the one whose step is foreseen.

    Args:
        machine: the budget.
        backend: ``metal``, ``cuda`` or ``cpu``: whose step it is.
    """
    found = _FORM.fullmatch(machine.label)
    own = {"mac": "metal", "card": "cuda"}.get((found[3] or "").lower() if found else "", backend)
    if own == backend:
        return ()
    return (
        f"{machine.label} is only the limit: the step is foreseen as this machine's back end ({backend}) takes it.",
    )


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
    if high <= free:
        reason = f"{size_text(expected)} of {size_text(free)}, {size_text(margin)} to spare"
        return Verdict("fits", margin, f"{reason}.", machine)
    if expected <= free:
        reason = (
            f"{size_text(expected)} of {size_text(free)}, but it may take up to {size_text(high)}"
        )
        return Verdict("tight", margin, f"{reason}.", machine)
    busy = ""
    if expected <= machine.total_nbytes:
        busy = f" It would fit if other programs left the {size_text(machine.total_nbytes)} of {machine.label} free."
    reason = f"{size_text(expected)} are {size_text(-margin)} more than the {size_text(free)} at hand; most of it is {largest}."
    return Verdict("does not fit", margin, reason + busy, machine)
