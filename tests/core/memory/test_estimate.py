"""An estimate is a value: its total, its band, its verdict, and what it says of itself."""

from __future__ import annotations

import pytest

from tests.core.memory.estimates import EST, SETUP, at


def test_the_total_is_the_sum_of_the_parts_and_the_band_counts_for_what_is_not_exact():
    assert EST.total_nbytes == 40_000 + 3200 + 400_000 + 100_000
    assert EST.exact_nbytes == 43_200
    assert (EST.low_nbytes, EST.high_nbytes) == (43_200 + 450_000, 43_200 + 600_000)


def test_the_old_name_of_the_total_warns():
    with pytest.deprecated_call(match="total_nbytes"):
        assert EST.expected_nbytes == EST.total_nbytes


def test_the_largest_part_is_said_in_words():
    assert "blocks computed" in EST.largest


def test_a_verdict_takes_the_estimates_machine_unless_another_is_given():
    assert EST.fits() and EST.verdict().machine is EST.machine
    assert not EST.fits(EST.total_nbytes - 1) and EST.verdict(EST.total_nbytes).word == "tight"


def test_estimates_of_equal_setups_are_equal():
    assert at(SETUP) == EST != at(SETUP.with_value("rank", 16))


def test_the_text_names_model_setup_total_and_parts():
    text = repr(EST)
    assert text.startswith("MemoryEstimate(toy, affine 4-bit g64, lora r8, 4 × 100 tokens: 0.5 MB")
    assert "activations" in text and "fits" in text
