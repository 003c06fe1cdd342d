"""A setup with one value changed."""

from __future__ import annotations

import pytest

from qlab.core.config.quant import QuantConfig, QuantPlan
from qlab.core.memory.setup import Setup
from tests.core.memory.estimates import SETUP


def test_a_setting_goes_to_the_config_that_has_it():
    assert SETUP.with_value("num_layers", 2).adapter.num_layers == 2
    assert SETUP.with_value("batch_size", 9).train.batch_size == 9


def test_another_rank_keeps_alpha():
    changed = SETUP.with_value("rank", 32)
    assert changed.adapter.alpha == pytest.approx(SETUP.adapter.alpha)


def test_other_bits_keep_mode_and_group_size_and_drop_overrides():
    plan = QuantPlan(QuantConfig(bits=4, group_size=32), {"lm_head": None})
    changed = Setup(plan).with_value("bits", 8)
    assert changed.plan == QuantPlan(QuantConfig(bits=8, group_size=32))
    assert Setup(None).with_value("bits", 8).plan.default.bits == 8


def test_the_label_counts_overrides():
    assert Setup(None).label == "as stored"
    plan = QuantPlan(QuantConfig(bits=4), {"lm_head": None})
    assert Setup(plan).label == "affine 4-bit g64 + 1 own"
