"""The facade: traits, overrides, errors, reports, and the panel without a browser."""

from __future__ import annotations

import json

import numpy as np
import pytest
import traitlets

import qlab
from qlab.core.config.quant import QuantConfig
from qlab.core.config.quant import QuantPlan
from qlab.errors import ConfigError
from qlab.errors import LayerNotFoundError

DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture
def q(demo):
    made = qlab.Quantizer(demo, bits=4, group_size=64)
    yield made
    made.close()


def test_mode_pulls_bits_and_group_size_to_what_it_has(q):
    q.bits, q.group_size = 5, 128
    q.mode = "mxfp4"
    assert (q.bits, q.group_size) == (4, 32)
    q.mode = "affine"
    assert q.plan.default == QuantConfig("affine", 4, 32)


def test_illegal_value_is_refused_and_changes_nothing(q):
    for name, value, words in (
        ("bits", 7, "nearest is 6"),
        ("group_size", 48, "nearest is 32"),
        ("mode", "afine", "'affine'"),
        ("solver", "serched", "'searched'"),
    ):
        with pytest.raises(ConfigError, match=words):
            setattr(q, name, value)
    assert (q.mode, q.bits, q.group_size, q.solver) == ("affine", 4, 64, "rtn")
    with pytest.raises(ConfigError, match="nearest is 6"):
        qlab.Quantizer(q._model, bits=7)


def test_traits_can_be_observed_and_linked(q, demo):
    seen = []
    q.observe(lambda change: seen.append(change["new"]), "bits")
    other = qlab.Quantizer(demo, bits=2)
    traitlets.dlink((q, "bits"), (other, "bits"))
    q.bits = 3
    assert seen == [3] and other.bits == 3
    other.close()


def test_override_by_path_and_pattern_and_back(q):
    q.set(DOWN, bits=8)
    q.set("*.k_proj", bits=None)
    assert q.plan.overrides[DOWN] == QuantConfig("affine", 8, 64)
    assert sum(config is None for config in q.plan.overrides.values()) == 8
    assert eval(repr(q.plan), {"QuantPlan": QuantPlan, "QuantConfig": QuantConfig}) == q.plan
    q.unset("*.k_proj")
    assert list(q.plan.overrides) == [DOWN]
    with pytest.raises(LayerNotFoundError, match=DOWN):
        q.set("model.layers.0.mlp.down_prj", bits=8)


def test_code_rebuilds_the_state(q, demo):
    q.set(DOWN, bits=8, group_size=32)
    q.set("model.embed_tokens", bits=None)
    made = {}
    exec(q.code, {"qlab": qlab, "model": demo}, made)
    assert made["q"].plan == q.plan
    made["q"].close()


def test_report_adds_up_and_names_the_worst(q):
    report = q.report
    assert report.nbytes == sum(x.nbytes for x in report.layers) + q._model.spec.other_nbytes
    assert report.bits_per_weight == pytest.approx(4.51, abs=0.01)
    assert {x.depth for x in report.layers} <= {"sampled", "exact"}
    errors = [x.relative_error for x in report.layers]
    assert not np.isnan(errors).any()
    frame = report.to_pandas()
    assert frame.loc[DOWN, "config"] == "affine 4-bit g64" and len(frame) == 57
    assert {x.depth for x in q.measure(exact=True).layers} == {"exact"}


def test_worst_goes_by_predicted_kl_once_it_is_known(q):
    report = q.predict()
    costs = [x.kl_nats for x in report.worst(5)]
    assert costs == sorted(costs, reverse=True) and costs[0] == max(
        x.kl_nats for x in report.layers
    )
    assert report.kl_nats == pytest.approx(sum(x.kl_nats for x in report.layers))


def test_comparison_knows_its_front(q):
    report = q.compare()
    front = report.front
    assert all(a.error > b.error for a, b in zip(front, front[1:], strict=False))
    by_label = {p.config.label: p for p in report.points}
    assert by_label["symmetric 4-bit g64"].dominated_by  # same bytes as affine, more error
    assert len(report.points) == 49


def test_allocation_beats_the_same_bytes_everywhere(q):
    uniform = q.judge()
    size = q.report.nbytes
    q.allocate(bits_per_weight=4.5)
    assert q.report.nbytes <= size
    assert q.judge().kl_nats < uniform.kl_nats
    with pytest.raises(ConfigError, match="below the smallest"):
        q.allocate(bits_per_weight=0.5)


def test_searched_refuses_a_mode_that_it_cannot_fill(q):
    q.mode = "mxfp4"
    with pytest.raises(ConfigError, match="affine, not 'mxfp4'"):
        q.quantize(solver="searched")


def test_panel_intents_change_the_traits_and_bad_ones_are_shown_not_raised(q):
    widget = q.widget
    controls = widget.controls
    controls.intent = {"seq": 1, "op": "set", "mode": "affine", "bits": 3, "group_size": 32}
    assert (q.bits, q.group_size) == (3, 32) and widget.state["ack"] == 1
    controls.intent = {"seq": 2, "op": "override", "paths": [DOWN], "config": ["affine", 8, 32]}
    assert q.plan.overrides[DOWN].bits == 8
    controls.intent = {"seq": 3, "op": "override", "paths": [DOWN], "config": "default"}
    assert not q.plan.overrides
    for bad in (
        {"seq": 4, "op": "explode"},
        {"seq": 5, "op": "set", "mode": "affine", "bits": 7, "group_size": 64},
        {"seq": 6, "op": "set"},
    ):
        controls.intent = bad
        assert widget.state["error"]
    assert (q.bits, q.group_size) == (3, 32)


def test_bundle_has_widget_html_and_one_line(q):
    q.predict()
    data, _ = q._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    assert "\n" not in data["text/plain"] and "4.51 bits/weight" in data["text/plain"]
    assert "<svg" not in data["text/html"] and "<script" not in data["text/html"]
    json.dumps(q.widget.state)


def test_two_panels_on_one_model_share_what_was_measured(q, demo):
    other = qlab.Quantizer(demo, bits=2)
    assert other._model.measurements is q._model.measurements
    other.close()


def test_model_without_a_layer_to_quantize_says_so(q):
    q.set("*", bits=None)
    with pytest.raises(qlab.QlabError, match="nothing to quantize"):
        q.quantize()


@pytest.mark.parametrize("how", ["trait", "browser"])
def test_one_slider_move_builds_one_config_and_one_plan(q, monkeypatch, how):
    _ = q.report
    widget = q.widget
    q._jobs.stop()
    built = []
    for kind in (QuantConfig, QuantPlan):
        check = kind.__post_init__
        monkeypatch.setattr(
            kind, "__post_init__", lambda value, check=check: (built.append(value), check(value))
        )
    if how == "trait":
        q.bits = 3
    else:
        move = {"seq": 1, "op": "set", "mode": "affine", "bits": 3, "group_size": 32}
        widget.controls.intent = move
    assert widget.state["bits"] == 3
    assert [type(value) for value in built] == [QuantConfig, QuantPlan]
    assert q.plan.default is q.config is built[0] and q.plan is built[1]


def test_settings_by_position_still_work_with_a_warning(demo):
    with pytest.warns(DeprecationWarning, match=r"Quantizer\(…\).*use bits=…, group_size=…"):
        made = qlab.Quantizer(demo, 3, 32)
    assert made.config == QuantConfig("affine", 3, 32)
    made.close()


def test_judge_is_another_name_for_evaluate(q):
    assert q.judge == q.evaluate and q.judge_layers == q.evaluate_layers
    report = q.evaluate(tokens=64)
    assert report.kl_nats > 0
    assert set(q.evaluate_layers(2)) == {layer.path for layer in q.report.worst(2)}
