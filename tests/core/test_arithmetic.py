"""Division and multiples that round up."""

from __future__ import annotations

import pytest

from qlab.core.arithmetic import ceil_div, round_up


@pytest.mark.parametrize("divisor", [1, 2, 7, 64])
def test_division_and_multiples_round_up(divisor):
    for number in range(200):
        assert ceil_div(number, divisor) == (number + divisor - 1) // divisor
        assert number <= round_up(number, divisor) < number + divisor
        assert round_up(number, divisor) % divisor == 0
