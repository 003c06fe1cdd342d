"""A judgement's arithmetic: errors over rows, intervals, paired changes, and what it says of itself."""

from __future__ import annotations

import math
from dataclasses import replace
import re

import numpy as np
import pytest

from qlab.core.evaluate.judge import COLUMNS
from qlab.core.evaluate.judge import Column
from qlab.core.evaluate.judge import JudgeReport
from qlab.core.evaluate.judge import Sample
from qlab.core.evaluate.judge import Scores
from qlab.core.evaluate.statistics import ratio
from qlab.errors import ConfigError


def drawn(rng: np.random.Generator, level: float, rows: np.ndarray, counts: np.ndarray) -> Scores:
    """Rows that are easy or hard as a whole, so that their tokens depend on one another."""
    each = [level + row + rng.normal(0, 0.3, n) for row, n in zip(rows, counts, strict=True)]
    sums = np.array([part.sum() for part in each])
    hits = np.array([(part < 2).sum() for part in each], float)
    return Scores(
        targets=counts.astype(float),
        nll=sums,
        hits=hits,
        kl_nats=sums / 10,
        flips=hits / 2,
        kl_each=np.concatenate(each) / 10,
    )


def made(rows: int = 60) -> JudgeReport:
    rng = np.random.default_rng(0)
    counts, hard = rng.integers(5, 40, rows), rng.normal(0, 0.5, rows)
    columns = [
        Column.of(n, drawn(rng, x, hard, counts), [1, 0, 1.0], 1.5)
        for n, x in zip(COLUMNS, (2.0, 2.3, 2.1), strict=True)
    ]
    sample = Sample("Who?", ("a", "b", "a"), "a", (1.0, 0.0, 1.0))
    return JudgeReport(
        columns=tuple(columns),
        samples=(sample,),
        rows=rows,
        targets=int(counts.sum()),
        teacher="exact",
    )


def test_the_standard_error_is_that_of_a_bootstrap_over_rows():
    scores, rng = made()["quantized"].scores, np.random.default_rng(1)
    picks = rng.integers(0, 60, (4000, 60))
    spread = (scores.nll[picks].sum(1) / scores.targets[picks].sum(1)).std()
    mean, error = ratio(scores.nll, scores.targets)
    assert mean == pytest.approx(scores.nll.sum() / scores.targets.sum())
    assert error == pytest.approx(spread, rel=0.08)


def test_tokens_of_a_row_are_not_counted_as_draws():
    scores = made()["quantized"].scores
    naive = np.std(scores.kl_each * 10) / math.sqrt(scores.kl_each.size)
    assert ratio(scores.nll, scores.targets)[1] > 2.5 * naive


def test_a_change_is_measured_in_pairs_and_so_more_sharply():
    report = made()
    change, error = report.change("nll", "quantized", "full precision")
    assert change == pytest.approx(report["quantized"].nll - report["full precision"].nll)
    assert error < report["quantized"].nll_se / 5


def test_figures_of_a_column_are_means_over_targets():
    column = made()["quantized"]
    scores = column.scores
    assert column.perplexity == pytest.approx(math.exp(scores.nll.sum() / scores.targets.sum()))
    assert column.perplexity_se == pytest.approx(column.perplexity * column.nll_se)
    assert column.kl_nats_p99 == np.quantile(scores.kl_each, 0.99)
    assert column.golden_score == pytest.approx(2 / 3)
    assert column.golden_se == pytest.approx(math.sqrt(2 / 9 / 3))  # √(p(1−p)/n)
    assert math.isinf(Column(name="x", nll=1e4).perplexity)


def test_the_report_reads_as_a_table_and_says_what_changed():
    text = repr(made())
    assert (
        all(name in text for name in COLUMNS)
        and "±" in text
        and "66.7%" in text
        and "exact" in text
    )
    change, error = made().change("nll", "quantized", "full precision")
    assert (
        f"quantized: loss (nats/token) higher by {change:.3g} ± {error:.2g} than full precision."
        in text
    )
    assert re.search(r"loss \(nats/token\) lower by \S+ ± \S+ than quantized\.", text)


def test_a_change_within_its_error_is_called_so():
    scores = made()["quantized"].scores
    noise = np.random.default_rng(3).normal(0, 0.1, 60)
    other = replace(scores, nll=scores.nll + noise - noise.mean())
    report = JudgeReport(
        columns=(Column.of("a", scores), Column.of("b", other)), rows=60, targets=9
    )
    assert "within the error" in report.verdict[0]


def test_what_was_not_measured_is_left_out():
    report = JudgeReport(columns=(Column.of("quantized", None, [1.0, 1.0]),))
    text = repr(report)
    assert "perplexity" not in text and "100.0% (34% to 100%)" in text and report.verdict == ()
    with pytest.raises(ConfigError, match="only on prompts"):
        report.change("nll", "quantized", "quantized")


def test_misspelt_columns_and_measures_get_the_nearest():
    with pytest.raises(ConfigError, match="'quantized'"):
        made()["quantised"]
    with pytest.raises(ConfigError, match="'flips'"):
        made().change("flip", "quantized", "quantized")


def test_the_data_frame_has_a_row_a_column():
    frame = made().to_pandas()
    assert list(frame.index) == list(COLUMNS) and {"perplexity", "kl_nats_se", "golden_low"} <= set(
        frame.columns
    )
    assert "scores" not in frame.columns
