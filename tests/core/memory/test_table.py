"""Estimates side by side, as records and as text."""

from __future__ import annotations

from qlab.core.memory.table import EstimateTable
from tests.core.memory.estimates import EST, SETUP, at

TABLE = EstimateTable((EST, at(SETUP.with_value("grad_checkpoint", True))))


def test_rows_are_read_by_number_and_one_after_the_other():
    assert len(TABLE) == 2 and TABLE[0] is EST and [*TABLE] == [TABLE[0], TABLE[1]]


def test_a_record_has_the_settings_the_parts_and_the_verdict():
    record = TABLE.records()[1]
    assert record["grad_checkpoint"] and record["weights as"] == "affine 4-bit g64"
    assert record["activations_nbytes"] == 200_000 and record["verdict"] == "fits"
    assert record["total_nbytes"] == TABLE[1].total_nbytes


def test_parts_that_no_row_needs_have_no_column():
    head, first, second = TABLE.cells()
    assert "activations" in head and "optimizer" not in head
    assert first[3] == "4×100" and second[3] == "4×100 ckpt"
    assert repr(TABLE).splitlines()[0].split()[:3] == ["model", "weights", "as"]
