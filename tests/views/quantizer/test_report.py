"""A report of a plan and an evaluation as a notebook shows them."""

from __future__ import annotations

from dataclasses import replace

import pytest

import qlab
from qlab.core.evaluate.text import EvalReport


@pytest.fixture(scope="module")
def report(demo):
    q = qlab.Quantizer(demo)
    made = q.predict()
    q.close()
    return made


def test_a_report_shows_the_whole_and_its_worst_layers(report):
    text = report._repr_html_()
    assert f"<b>{report.bits_per_weight:.2f}</b> bits/weight" in text
    assert "predicted ΔKL" in text and report.worst(1)[0].path in text
    assert text.count("<tr>") == 1 + 12


def test_names_of_layers_are_escaped(report):
    evil = replace(report.layers[0], path="<img src=x>", kl_nats=9.0)
    assert "<img" not in replace(report, layers=(evil,))._repr_html_()


def test_an_evaluation_shows_its_figures():
    report = EvalReport(
        kl_nats=0.0123,
        kl_nats_se=0.002,
        kl_nats_p99=0.2,
        top1_flips=0.05,
        perplexity=12.34,
        perplexity_before=12.0,
        tokens=1000,
    )
    text = report._repr_html_()
    for figure in ("0.0123 ± 0.002", "0.2", "5.0%", "12.34 (original 12)", "1,000"):
        assert figure in text
