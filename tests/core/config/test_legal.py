"""Checks of single settings: what is legal, and what a refusal says."""

import pytest

from qlab.core.config.legal import (
    check_choice,
    check_flag,
    check_number,
    check_whole,
    is_number,
    is_whole,
)
from qlab.errors import ConfigError


@pytest.mark.parametrize("value", [True, 1.0, "1", None, 0])
def test_a_whole_number_is_no_truth_value_and_not_below_the_least(value):
    assert not is_whole(value, 1)
    with pytest.raises(ConfigError, match=r"rank=.* is not legal; it is a whole number, 1 or more"):
        check_whole("rank", value, 1)


@pytest.mark.parametrize("value", [False, float("nan"), float("inf"), "2", None])
def test_a_number_is_finite_and_no_truth_value(value):
    assert not is_number(value)


def test_a_number_may_be_larger_than_a_float_can_hold():
    assert is_number(10**400)


def test_refusals_name_the_setting_and_what_is_legal():
    with pytest.raises(ConfigError, match=r"pack=1 is not legal; it is True or False"):
        check_flag("pack", 1)
    with pytest.raises(ConfigError, match=r"rate=-1 is not legal; it is a number above 0"):
        check_number("rate", -1, "a number above 0", lambda x: x > 0)
    with pytest.raises(ConfigError, match=r"choose one of skip, stop. Did you mean 'skip'\?"):
        check_choice("on_nonfinite", "skp", ("skip", "stop"))
