"""Tables and lists escape what they are given."""

from __future__ import annotations

from qlab.views.shared.markup import bullets, scrollable, table

EVIL = "<img src=x>"


def test_cells_heads_and_lines_are_escaped():
    assert EVIL not in table([EVIL], [[EVIL]]) + bullets([EVIL])
    assert table(["a"], [["b"]]).count("<tr>") == 2


def test_an_empty_list_is_nothing():
    assert bullets([]) == ""


def test_a_wide_table_scrolls_within_itself():
    assert scrollable("<table></table>").startswith("<div style='overflow-x:auto'>")
