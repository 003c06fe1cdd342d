"""Text for calibration and evaluation: where it comes from, and how it is cut into rows."""

from __future__ import annotations

import pytest

from qlab.engine.data.text import batches, read_text, token_batches
from qlab.errors import DataError
from qlab.runtime.job import mlx_call


def test_texts_come_from_files_of_rows_and_of_any_other_kind(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "One."}\n{"text": "Two."}\n')
    (tmp_path / "notes.md").write_text("# Three.")
    assert read_text(str(tmp_path / "rows.jsonl"), "", 99) == ("One.\n\nTwo.", "rows.jsonl")
    assert read_text(tmp_path / "notes.md", "", 99) == ("# Three.", "notes.md")
    assert read_text("A text. Of two sentences.", "", 6) == ("A text", "your text")
    (tmp_path / "rows.jsonl").write_text('{"text": "One."}\n{"text"\n')
    for source, words in (
        (tmp_path / "rows.jsonl", "Row 1 cannot be used: line 2 of rows.jsonl"),
        ([3], "Row 0 has no text.*an int"),
    ):
        with pytest.raises(DataError, match=words):
            read_text(source, "", 99)


def test_tokens_are_cut_into_rows_that_begin_alike():
    rows = mlx_call(lambda: [r.tolist()[0] for r in token_batches([*range(10)], 4, 8, [99])])
    assert rows == [[99, 0, 1, 2], [99, 3, 4, 5], [99, 6, 7]]


def test_a_row_of_one_token_is_left_out():
    assert mlx_call(lambda: len(token_batches([1, 2, 3], 2, 99))) == 1


def test_the_embedded_text_is_named_and_counted(demo):
    rows, words = mlx_call(batches, demo.tokenizer, None, "heldout.txt", 300)
    assert words == f"embedded text, {sum(row.size for row in rows)} tokens"


def test_text_without_tokens_is_refused(demo):
    with pytest.raises(DataError, match="The text is empty"):
        read_text(" ", "", 9)
    with pytest.raises(DataError, match="is outside the model's vocabulary"):
        mlx_call(batches, demo.tokenizer, "Some words.", "", 9, 1)
