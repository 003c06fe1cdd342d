"""Rows and batches as values: what is equal stays together, and what the model lacks is said."""

from __future__ import annotations

import numpy as np
import pytest

from qlab.core.train.rows import Row, Rows, order, outside_vocabulary
from qlab.errors import DataError


def row(*tokens: int, number: int = 0) -> Row:
    mask = np.ones(len(tokens), np.uint8)
    return Row(number=number, tokens=np.array(tokens, np.int32), mask=mask)


def rows(count: int) -> Rows:
    return Rows(tuple(row(1, n, number=n) for n in range(count)))


def test_a_token_outside_the_vocabulary_is_said_with_the_legal_ones():
    assert outside_vocabulary([0, 7, 2], 3).startswith(
        "token 7 is outside the model's vocabulary (0–2);"
    )
    assert outside_vocabulary([0, -1], 3).startswith("token -1 is outside")
    assert outside_vocabulary([0, 1, 2], 3) == outside_vocabulary([9], None) == ""


def test_a_split_holds_out_as_many_as_asked_and_loses_none():
    trained, held = rows(10).split(3, seed=1)
    assert len(held) == 3 and len(trained) == 7
    assert sorted(x.number for x in (*trained, *held)) == list(range(10))
    assert [x.number for x in trained] == sorted(x.number for x in trained)


def test_a_share_is_held_out_and_the_seed_decides_which():
    assert len(rows(10).split(0.2, seed=1)[1]) == 2
    first, again, other = (rows(50).split(0.2, seed=s)[1] for s in (1, 1, 2))
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_equal_rows_stay_on_one_side():
    twins = Rows(tuple(row(1, n // 2, number=n) for n in range(20)))
    trained, held = twins.split(5, seed=3)
    assert not {x.digest for x in trained} & {x.digest for x in held}
    assert len(held) == 4


@pytest.mark.parametrize("held", [0, 10, True, 1.0, float("nan"), -1])
def test_what_cannot_be_held_out_is_refused(held):
    with pytest.raises(DataError, match="of 10 rows cannot be held out; hold out 1 to 9"):
        rows(10).split(held, seed=0)


def test_an_order_is_a_permutation_that_a_seed_decides():
    assert sorted(order(100, 7, 1).tolist()) == list(range(100))
    assert order(100, 7, 1).tolist() == order(100, 7, 1).tolist() != order(100, 7, 2).tolist()


def test_rows_say_what_they_are():
    assert repr(rows(2)) == "Rows(2 text, 4 tokens, 4 targets)"
    lost = Rows((row(1, 2), row(1, 2)), "chat", ((3, "it is empty"),))
    assert repr(lost) == "Rows(2 chat, 4 tokens, 4 targets, 1 duplicates, 1 dropped)"
