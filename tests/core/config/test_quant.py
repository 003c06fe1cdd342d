"""Plans as values: they paste back, pickle and copy."""

import copy
import pickle

import pytest

from qlab.core.config.quant import QuantConfig, QuantPlan

EIGHT = QuantConfig("affine", bits=8)


@pytest.mark.parametrize(
    "value",
    [
        QuantConfig(),
        EIGHT,
        QuantPlan(),
        QuantPlan(QuantConfig("nf4"), {"lm_head": EIGHT, "model.embed_tokens": None}),
    ],
    ids=lambda value: value.label,
)
def test_a_config_or_plan_pastes_back_pickles_and_copies(value):
    assert eval(repr(value)) == value
    assert pickle.loads(pickle.dumps(value)) == value
    assert copy.deepcopy(value) == value


def test_a_label_counts_the_layers_that_differ():
    plan = QuantPlan(QuantConfig(), {"a": EIGHT})
    assert plan.label == "affine 4-bit g64 (1 layer otherwise)"
    assert plan.with_override("b", None).label == "affine 4-bit g64 (2 layers otherwise)"


def test_plan_drops_an_override_that_equals_the_default_and_is_a_value():
    plan = QuantPlan(QuantConfig("affine", 4, 64), {"a": QuantConfig("affine", 8, 64)})
    assert plan.with_override("a", plan.default) == QuantPlan(plan.default)
    assert hash(plan) == hash(eval(repr(plan))) and eval(repr(plan)) == plan
    assert plan.config_for("b") == plan.default
