"""The mask viewer: what is trained, masked and cut can be told apart, with and without styles."""

from __future__ import annotations

import re

from qlab.core.train.data_report import DataReport
from qlab.core.train.rows import Rows
from qlab.views.cards.data import html
from tests.core.train.test_data_report import made, report  # noqa: F401


def test_html_tells_targets_and_cuts_by_tags_not_by_colour_alone(report):  # noqa: F811
    shown = html(report)
    bare = re.sub(r" style='[^']*'", "", shown)
    assert "<span>&lt;s&gt;Why?↵\n</span><ins>Be</ins><ins>cause</ins><ins>&lt;/s&gt;</ins>" in bare
    assert "<del> and &lt;more&gt;…</del>" in bare
    assert not re.search(r"<(script|svg|style|b>&)|class=|https?:", shown)


def test_what_comes_from_the_data_is_escaped(report):  # noqa: F811
    assert (
        "<more>" not in html(report) and "<off>" not in html(report) and "<s>" not in html(report)
    )


def test_neighbouring_targets_have_different_shades(report):  # noqa: F811
    shades = re.findall(r"<ins style='([^']*)'>(?:Be|cause|&lt;/s&gt;)", html(report))
    assert len(shades) == 3 and shades[0] != shades[1] == shades[1] and shades[0] == shades[2]


def test_long_rows_are_not_shown_whole(report):  # noqa: F811
    long = made(["w "] * 5000, [0] + [1] * 4999)
    many = DataReport(
        rows=Rows((long.row,)),
        shown=(long,) * 6,
        shapes=((1, 5000),),
        waste=1.0,
        per_epoch=1,
        packed=False,
    )
    assert "4,680 more tokens" in html(many) and len(html(many)) < 150_000


def test_the_report_shows_itself_by_this_view(report):  # noqa: F811
    assert report._repr_html_() == html(report)
