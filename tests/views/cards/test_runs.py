"""Runs side by side, charts, and the evaluation card."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from qlab.core.evaluate.judge import COLUMNS
from qlab.core.evaluate.judge import Column
from qlab.core.evaluate.judge import JudgeReport
from qlab.core.evaluate.judge import Sample
from qlab.core.evaluate.judge import Scores
from qlab.errors import ConfigError
from qlab.views.shared.chart import Line
from qlab.views.shared.chart import robust_range
from qlab.views.shared.chart import svg
from qlab.views.shared.chart import ticks
from qlab.views.cards.runs import Runs
from tests.views.runs import events, run_state


def runs(count: int = 3, **more) -> Runs:
    histories = tuple(events(60 * (n + 1), seed=n, **more) for n in range(count))
    reports = tuple(
        replace(
            run_state(history, "done").report, storage=f"affine {n + 2}-bit g64", path=f"runs/{n}"
        )
        for n, history in enumerate(histories)
    )
    return Runs(reports, histories)


def pictures(text: str) -> list[str]:
    return [
        base64.b64decode(data).decode()
        for data in re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', text)
    ]


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_row_a_run_and_a_curve_a_run_labelled_by_what_differs():
    made = runs()
    text = made._repr_html_()
    assert text.count("<tr") == 4 and "<svg" not in text
    (picture,) = pictures(text)
    for n in range(3):
        assert f"#{n + 1} affine {n + 2}-bit g64" in picture
    assert "lora r8" not in picture


def test_the_best_run_is_starred_in_text_and_table():
    made = runs()
    lines = repr(made).splitlines()
    assert [("★" in line) for line in lines[1:4]] == [n == made.best for n in range(3)]
    assert made._repr_html_().count("★") == 1


def test_runs_without_validation_are_drawn_and_none_is_best():
    made = runs(every=None)
    assert made.best is None and "#1" in pictures(made._repr_html_())[0]


def test_no_run_and_a_run_without_steps_are_told():
    assert "No run" in Runs((), ())._repr_html_() and "none" in repr(Runs((), ()))
    idle = Runs((run_state(status="running").report,), ((),))
    assert "0 of 400" in idle._repr_html_() and pictures(idle._repr_html_()) == []


def test_a_run_without_its_history_is_refused():
    with pytest.raises(ConfigError, match="2 reports"):
        Runs(runs(2).reports, ())


def test_tables_for_pandas_and_figures_for_plotly():
    made = runs()
    frame = made.to_pandas()
    assert list(frame.storage) == [
        "affine 2-bit g64",
        "affine 3-bit g64",
        "affine 4-bit g64",
    ] and isinstance(frame.notes[0], str)
    assert len(made.plot().data) == 6


def test_names_of_runs_are_escaped():
    evil = "<img src=x onerror='1'>"
    made = runs(2)
    made = Runs(
        tuple(replace(r, model=evil + str(n), path=evil) for n, r in enumerate(made.reports)),
        made.histories,
    )
    assert "<img src=x" not in made._repr_html_() and "onerror='" not in made._repr_html_()
    ElementTree.fromstring(pictures(made._repr_html_())[0])


# --- charts -----------------------------------------------------------------------------------------------------------


def test_many_labels_at_one_height_do_not_lie_on_each_other():
    lines = tuple(Line(label=f"run {n}", x=np.arange(3.0), y=np.full(3, 2.0)) for n in range(9))
    tree = ElementTree.fromstring(svg(lines, "step", "loss"))
    ys = sorted(
        float(e.get("y"))
        for e in tree.iter("{http://www.w3.org/2000/svg}text")
        if (e.text or "").startswith("run ")
    )
    assert len(ys) == 9 and min(np.diff(ys)) >= 12 and ys[-1] <= 300


def test_a_spike_of_faint_points_may_leave_the_axis_and_a_line_may_not():
    y = np.full(200, 2.0)
    y[7] = 90
    assert robust_range((Line(label="", x=np.arange(200.0), y=y, look="dots"),))[1] < 3
    assert robust_range((Line(label="", x=np.arange(200.0), y=y),))[1] > 90


def test_ticks_are_round_and_a_chart_without_points_is_drawn():
    assert ticks(0, 400, 4) == [0, 100, 200, 300, 400] and ticks(3, 3) == [3]
    ElementTree.fromstring(svg((Line(label="", x=np.zeros(0), y=np.zeros(0)),), "step", "loss"))


# --- evaluation -------------------------------------------------------------------------------------------------------


def judged(**more) -> JudgeReport:
    rng = np.random.default_rng(0)
    targets = rng.integers(20, 60, 12).astype(float)
    columns = []
    for n, name in enumerate(COLUMNS):
        level = (2.0, 2.4, 1.7)[n]
        scores = Scores(
            targets=targets,
            nll=level * targets + rng.standard_normal(12),
            hits=0.5 * targets,
            kl_nats=0.1 * n * targets,
            flips=0.05 * n * targets,
            kl_each=rng.random(50) * 0.2 * n,
        )
        columns.append(Column.of(name, scores, golden=[1.0, 0.0, 1.0, 1.0][: 4 if n else 3]))
    samples = (
        Sample("2 + 2 =", ("4", "five", "4"), "4", (1.0, 0.0, 1.0)),
        Sample("Hello", ("Hi", "<b>Hi</b>", "Hi!")),
    )
    return JudgeReport(
        columns=tuple(columns),
        samples=samples,
        rows=12,
        targets=int(targets.sum()),
        teacher="exact",
        **more,
    )


def test_the_card_shows_three_models_side_by_side_with_errors_and_answers():
    text = judged()._repr_html_()
    for word in (
        *COLUMNS,
        "perplexity",
        "top-token flips",
        "golden set",
        "±",
        "less is better",
        "more is better",
        "five",
    ):
        assert word in text
    assert re.search(
        r"quantized \+ adapter: loss \(nats/token\) lower by [^<]* than quantized", text
    )
    assert "&lt;b&gt;Hi&lt;/b&gt;" in text and "<svg" not in text


def test_bars_are_as_long_as_their_numbers():
    text = judged()._repr_html_()
    row = text[text.index("perplexity") : text.index("token accuracy")]
    widths = [int(w) for w in re.findall(r"background:#4c78a8;width:(\d+)px", row)]
    report = judged()
    wanted = [90 * c.perplexity / max(c.perplexity for c in report.columns) for c in report.columns]
    assert np.allclose(widths, wanted, atol=1)


def test_a_card_with_prompts_alone_and_one_with_two_models_are_drawn():
    report = judged()
    assert (
        "perplexity"
        not in replace(
            report, columns=tuple(Column(name=n) for n in COLUMNS), rows=0, teacher=""
        )._repr_html_()
    )
    two = replace(report, columns=report.columns[1:], samples=())
    assert "full precision</th>" not in two._repr_html_()
    assert "> 2 + 2 =" in repr(report) and list(report.to_pandas().index) == list(COLUMNS)
