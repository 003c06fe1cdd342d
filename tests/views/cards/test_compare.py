"""The comparison of schemes as a cell shows it: a figure, a table, and a picture for other viewers."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from qlab.core.config.quant import QuantConfig
from qlab.core.quantize.compare import CompareReport
from qlab.core.quantize.compare import SchemePoint
from qlab.views.cards.compare import figure
from qlab.views.cards.compare import html
from qlab.views.cards.compare import svg


def point(config: QuantConfig, bits: float, error: float, dominated_by: str = "") -> SchemePoint:
    return SchemePoint(
        config=config,
        bits_per_weight=bits,
        nbytes=int(bits * 1e6),
        error=error,
        dominated_by=dominated_by,
        skipped_layers=0,
    )


@pytest.fixture
def report() -> CompareReport:
    points = (
        point(QuantConfig("affine", 3, 64), 3.5, 0.2),
        point(QuantConfig("mxfp4"), 4.25, 0.1),
        point(QuantConfig("affine", 4, 64), 4.5, 0.15, "mxfp4 4-bit g32"),
        point(QuantConfig("affine", 8, 64), 8.5, 0.0),
    )
    return CompareReport("<demo>", "relative weight error", points)


def test_every_config_is_a_mark_of_its_mode_and_the_front_is_joined(report):
    traces = {trace.name: trace for trace in figure(report).data}
    assert list(traces) == ["affine", "mxfp4", "Pareto front"]
    assert list(traces["affine"].x) == [3.5, 4.5, 8.5]
    assert list(traces["affine"].marker.opacity) == [1.0, 0.35, 1.0]
    assert list(traces["Pareto front"].text) == ["3b g64", "mxfp4", "8b g64"]
    assert "dominated by mxfp4" in traces["affine"].hovertext[1]


def test_table_says_what_is_on_the_front_and_what_dominates_the_others(report):
    text = html(report)
    assert text.count("on the front") == 3 and "<b>affine 3-bit g64</b>" in text
    assert "<td>affine 4-bit g64</td>" in text and "<td>mxfp4 4-bit g32</td>" in text
    assert "3 of 4 schemes are worth having" in text and "<demo>" not in text


def test_picture_draws_every_config_that_has_an_error(report):
    tree = ElementTree.fromstring(svg(report))
    circles = list(tree.iter("{http://www.w3.org/2000/svg}circle"))
    assert [circle.get("fill") == "none" for circle in circles] == [False, False, True]


def test_report_shows_itself_as_figure_table_and_text(report):
    bundle = report._repr_mimebundle_()
    assert bundle["application/vnd.plotly.v1+json"]["data"]
    assert bundle["text/html"] == html(report) == report._repr_html_()
    assert bundle["text/plain"] == repr(report)
    assert (
        repr(report) == "CompareReport('<demo>', 4 schemes, 3 on the front, relative weight error)"
    )


def test_a_report_of_the_demo_draws_every_scheme_on_the_shelf(demo):
    import qlab
    from qlab import registry

    quantizer = qlab.Quantizer(demo)
    compared = quantizer.compare()
    quantizer.close()
    names = [trace.name for trace in compared.figure().data]
    assert set(names) == {*registry.shelf("schemes"), "Pareto front"}
    assert sum(len(trace.x) for trace in compared.figure().data[:-1]) == len(compared.points)
