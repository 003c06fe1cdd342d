"""Budgets by name, and verdicts."""

from __future__ import annotations

import pytest

from qlab.core.machine import Machine, backend_notes, budget, verdict
from qlab.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "nbytes"),
    [
        ("16 GB Mac", 16 * 2**30 * 2 / 3),
        ("36 GB Mac", 36 * 2**30 * 3 / 4),
        ("24 GB card", 24 * 2**30 * 0.97),
        ("10 GB", 10e9),
        (" 1.5 gib ", 1.5 * 2**30),
        (7, 7),
    ],
)
def test_a_budget_is_what_its_name_says(name, nbytes):
    machine = budget(name)
    assert machine.free_nbytes == machine.total_nbytes == int(nbytes)


@pytest.mark.parametrize("wanted", [0, -1, float("nan"), float("inf"), True, None, "much", "0 GB"])
def test_what_is_no_budget_is_refused(wanted):
    with pytest.raises(ConfigError, match="not legal"):
        budget(wanted)


def test_a_machine_is_its_own_budget():
    machine = Machine("mine", 8, 4)
    assert budget(machine) is machine


def test_a_budget_of_another_backend_is_noted():
    mac = budget("16 GB Mac")
    assert backend_notes(mac, "metal") == () == backend_notes(budget("10 GB"), "cpu")
    (note,) = backend_notes(mac, "cuda")
    assert "only the limit" in note and "(cuda)" in note


def test_a_verdict_says_fits_tight_or_not_and_whether_others_are_in_the_way():
    machine = Machine("this machine", 100, 50)
    words = [verdict(expected, 45, "logits", machine).word for expected in (40, 50)]
    assert words == ["fits", "fits"]
    assert verdict(50, 51, "logits", machine).word == "tight"
    judged = verdict(60, 70, "logits", machine)
    assert not judged and judged.margin_nbytes == -10
    assert "other programs" in judged.reason and "most of it is logits" in str(judged)
