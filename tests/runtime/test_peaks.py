"""Bands come from own runs; the file stays whole, small and readable whatever is in it."""

from __future__ import annotations

import json
import os

import pytest

from qlab.runtime import peaks as record


@pytest.fixture(autouse=True)
def own_file(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "path", lambda: tmp_path / "cache" / "memory.jsonl")


def test_without_own_runs_the_band_is_the_shipped_one():
    assert record.band("cpu") == (0.94, 1.06)
    assert (
        record.band("metal")[1] - record.band("metal")[0]
        > record.band("cpu")[1] - record.band("cpu")[0]
    )


def test_own_runs_make_the_band():
    for i in range(10):
        record.add("cpu", 200, 100, 190 + i)
    low, high = record.band("cpu")
    assert 0.9 <= low < 0.91 and high == 1.02  # never narrower than 2 % on a side
    assert record.band("cuda") == (0.9, 1.2)


def test_a_few_runs_are_not_enough():
    for _ in range(7):
        record.add("cpu", 200, 100, 300)
    assert record.band("cpu") == (0.94, 1.06)


def test_the_file_is_bounded():
    for i in range(record._MOST_LINES + 30):
        record.add("cpu", 200, 100, 150 + i)
    lines = record.path().read_text().splitlines()
    assert (
        len(lines) == record._MOST_LINES
        and json.loads(lines[-1])["measured"] == 150 + record._MOST_LINES + 29
    )


def test_nonsense_in_the_file_is_passed_over():
    for _ in range(8):
        record.add("cpu", 200, 100, 210)
    with record.path().open("ab") as file:
        file.write(
            b'\xff\xfe\n{"backend": "cpu"}\n[1]\nnull\n{"backend": "cpu", "foreseen": "x", "exact": 1, "measured": 2}\n{"back'
        )
    assert record.band("cpu")[1] == pytest.approx(1.1)
    record.add("cpu", 200, 100, 210)
    assert len(record.path().read_text().splitlines()) == 9


@pytest.mark.parametrize(
    "sizes", [(100, 100, 150), (100, 200, 300), (200, 100, 50), (0, 0, 0), (100, -1, 50)]
)
def test_what_says_nothing_is_not_kept(sizes):
    record.add("cpu", *sizes)
    assert not record.path().exists()


def test_the_file_is_replaced_whole(monkeypatch):
    record.add("cpu", 200, 100, 210)
    before = record.path().read_text()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    record.add("cpu", 200, 100, 220)
    assert record.path().read_text() == before


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(record, "path", lambda: tmp_path / "file" / "memory.jsonl")
    record.add("cpu", 200, 100, 210)
    assert record.band("cpu") == (0.94, 1.06)
