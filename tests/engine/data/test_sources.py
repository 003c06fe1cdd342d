"""What data is: rows of many kinds of holders, files, or running text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlab.engine.data.conversation import Fault
from qlab.engine.data.sources import Text, numbered, path_of, rows_of
from qlab.errors import DataError

ROWS = [{"text": "a"}, {"text": "b"}]


def test_holders_of_the_same_rows_give_the_same_rows(tmp_path):
    import datasets
    import pandas as pd

    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "r.json").write_text(json.dumps(ROWS))
    (tmp_path / "r.csv").write_text("text\na\nb\n")
    pd.DataFrame(ROWS).to_parquet(tmp_path / "r.parquet")
    holders = [
        ROWS,
        {"text": ["a", "b"]},
        pd.DataFrame(ROWS),
        datasets.Dataset.from_list(ROWS),
        *sorted(tmp_path.iterdir()),
        str(tmp_path / "r.csv"),
    ]
    for holder in holders:
        assert list(rows_of(holder)) == ROWS


def test_text_is_told_from_a_path():
    assert isinstance(rows_of("A sentence, of words."), Text)
    assert path_of("rows.jsonl") == path_of("./rows.jsonl") == Path("rows.jsonl")
    assert path_of("Two words.") is path_of("one\nline.jsonl") is path_of([]) is None


def test_a_broken_line_stands_in_its_place(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"text": "a"}\n{\n{"text": "b"}\n')
    first, broken, last = rows_of(tmp_path / "r.jsonl")
    assert [first, last] == ROWS and isinstance(broken, Fault)
    assert str(broken).startswith("line 2 of r.jsonl is not JSON")


def test_another_kind_of_file_is_text_where_that_is_wanted(tmp_path):
    (tmp_path / "notes.md").write_text("# One")
    assert rows_of(tmp_path / "notes.md", plain=True) == "# One"
    with pytest.raises(DataError, match="is not read here"):
        rows_of(tmp_path / "notes.md")


def test_an_error_of_the_source_is_said_with_the_row():
    def failing():
        yield "a"
        raise KeyError("gone")

    with pytest.raises(DataError, match="failed at row 1: KeyError"):
        list(numbered(failing()))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (3, "an int; give a list"),
        (" ", "is empty"),
        ({"a": [1], "b": [1, 2]}, "'a' has 1, 'b' has 2"),
        ({"text": "a"}, "is one dict"),
        ("owner/name", "datasets.load_dataset"),
    ],
)
def test_what_is_no_data_is_refused(data, words):
    with pytest.raises(DataError, match=words):
        rows_of(data)
