"""Single changes that make a setup fit."""

from __future__ import annotations

from qlab.core.machine import budget
from qlab.core.memory.changes import QUALITY, changes
from tests.core.memory.estimates import EST, at


def test_nothing_is_changed_where_it_fits():
    assert changes(EST, at, budget(EST.total_nbytes)) == ()


def test_every_change_fits_and_the_least_cost_comes_first():
    machine = budget(400_000)
    found = changes(EST, at, machine)
    names = [change.name for change in found]
    assert names == ["batch_size", "grad_checkpoint", "max_seq_length"]
    assert all(at(change.setup).total_nbytes == change.total_nbytes <= 400_000 for change in found)
    costs = [QUALITY.index(change.quality) for change in found]
    assert costs == sorted(costs)


def test_fewer_rows_are_made_up_for_by_more_batches_a_step():
    rows = changes(EST, at, budget(400_000))[0]
    assert (rows.now, rows.then) == (4, 2)
    assert rows.setup.train.grad_accumulation_steps == 2
    assert "grad_accumulation_steps=2" in str(rows)


def test_bits_are_offered_where_they_are_enough():
    found = changes(EST, at, budget(EST.total_nbytes - 20_000))
    bits = next(change for change in found if change.name == "bits")
    assert (bits.now, bits.then, bits.quality) == (4, 2, "large")
