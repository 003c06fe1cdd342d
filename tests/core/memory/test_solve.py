"""The largest value of a setting that fits."""

from __future__ import annotations

import pytest

from qlab.core.machine import budget
from qlab.core.memory.setup import SOLVABLE
from qlab.core.memory.solve import solve
from qlab.errors import ConfigError
from tests.core.memory.estimates import EST, at


@pytest.mark.parametrize("name", SOLVABLE)
def test_the_solved_value_fits_and_the_next_larger_one_does_not(name):
    least = {"bits": 2, "max_seq_length": 30, "batch_size": 2, "rank": 3, "num_layers": 2}[name]
    machine = budget(at(EST.setup.with_value(name, least)).total_nbytes + 50)
    value = solve(EST, at, name, machine)
    assert value == least
    assert at(EST.setup.with_value(name, value)).fits(machine)


def test_where_all_fits_the_largest_legal_value_is_returned():
    large = budget(1e12)
    assert solve(EST, at, "max_seq_length", large) == EST.context
    assert solve(EST, at, "rank", large) == 64  # the narrower side of the layers
    assert solve(EST, at, "num_layers", large) == 4
    assert solve(EST, at, "bits", large) == 8


def test_where_nothing_fits_the_least_need_is_said():
    with pytest.raises(ConfigError, match="Not even max_seq_length=2 fits: it needs 0.2 MB"):
        solve(EST, at, "max_seq_length", budget(1000))


def test_an_unknown_setting_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'batch_size'"):
        solve(EST, at, "batchsize", budget(1e9))
