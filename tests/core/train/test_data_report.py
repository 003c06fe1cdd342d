"""What will be trained on, in plain text: targets and cuts are marked, losses counted."""

from __future__ import annotations

import numpy as np
import pytest

from qlab.core.train.data_report import (
    DataReport,
    ShownRow,
    batches,
    dropped,
    headline,
    histogram,
    text,
)
from qlab.core.train.rows import Row, Rows


def made(pieces, mask, number=0, cut=0, beyond=""):
    row = Row(
        number=number,
        tokens=np.arange(len(pieces), dtype=np.int32) + 100 * number,
        mask=np.array(mask, np.uint8),
        cut=cut,
    )
    return ShownRow(row, tuple(pieces), beyond)


@pytest.fixture
def report():
    shown = (
        made(["<s>", "Why", "?", "\n", "Be", "cause", "</s>"], [0, 0, 0, 0, 1, 1, 1]),
        made(["a", "<b>", "&"], [0, 1, 1], 1, cut=120, beyond=" and <more>"),
    )
    extra = tuple(made(["x"] * n, [0] + [1] * (n - 1), 7).row for n in (9, 9, 40))
    lost = tuple((n, "it is empty") for n in range(20, 40)) + ((50, "cut <off>"),)
    rows = Rows((*(x.row for x in shown), *extra), "chat", lost)
    return DataReport(
        rows=rows,
        shown=shown,
        shapes=((4, 40), (1, 9)),
        waste=1.234,
        per_epoch=2,
        packed=False,
        held=10,
        held_shared=2,
    )


def test_headline_tells_what_was_found(report):
    assert headline(report) == (
        "5 chat rows · 68 tokens · 60 targets (88 %) · 1 repeat another · 1 cut at the end · 21 dropped · "
        "10 held out, of which 2 are also trained on"
    )
    assert (
        batches(report)
        == "2 padded batches an epoch of 4 × 40, 1 × 9 tokens; 1.23 tokens computed per real one"
    )


def test_text_marks_targets_and_cuts(report):
    shown = text(report)
    assert "row 0: 7 tokens, 3 targets\n<s>Why?\n⟦Because</s>⟧" in shown
    assert "row 1: 3 tokens, 2 targets, 120 more cut off\na⟦<b>&⟧ ✂  and <more>…" in shown
    assert repr(report) == shown


def test_reasons_are_counted_with_the_first_numbers(report):
    first, second = dropped(report)
    assert first == "20: it is empty (row 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, …)"
    assert second == "1: cut <off> (row 50)"


def test_lengths_are_counted_in_full(report):
    bars = histogram(report)
    assert (
        sum(count for _, count in bars) == 5
        and bars[0][0].startswith("3–")
        and bars[-1][0].endswith("40")
    )
    one = DataReport(
        rows=Rows(report.rows.rows[:1]),
        shown=(),
        shapes=((1, 7),),
        waste=1.0,
        per_epoch=1,
        packed=True,
    )
    assert histogram(one) == [("7", 1)] and "1 packed batch an epoch of 1 × 7" in batches(one)


def test_an_older_spelling_still_leads_to_the_report(report):
    with pytest.warns(DeprecationWarning, match="use Trainer.data"):
        assert report.report is report
