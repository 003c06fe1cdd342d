"""Quantities follow from settings, and the sizes at which a step is read tell them apart."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from qlab.core.graph.sizes import CHUNKS, QUANTITIES, chunks, references, sizes


def test_quantities_follow_from_settings():
    assert dict(zip(QUANTITIES, sizes(2, 257, 8, 100), strict=True)) == {
        "batch": 2,
        "tokens": 256,
        "length": 257,
        "rank": 8,
        "chunk": 100,
        "rest": 12,
    }
    assert sizes(1, 65, 8, 512)[4:] == sizes(1, 65, 8, 0)[4:] == (1, 1)  # one chunk is no chunk


def test_more_chunks_than_a_few_are_a_few():
    assert [chunks(1, n * 10 + 1, 10) for n in (1, 2, 4, 5, 900)] == [1, 2, 4, CHUNKS, CHUNKS]


@pytest.mark.parametrize("tiles", [False, True], ids=["", "tiles"])
@pytest.mark.parametrize("several", [0, 1, 2, CHUNKS])
@pytest.mark.parametrize("widest", [1, 2, 4, 7, 4096])
def test_references_have_the_chunks_and_ranks_that_are_legal(several, widest, tiles):
    for ref in references(several, widest, tiles):
        assert ref.tokens % 128 == 0 or not tiles
        assert 1 <= ref.rank <= widest
        assert chunks(ref.batch, ref.tokens + 1, ref.chunk) == max(several, 1)


@pytest.mark.parametrize("tiles", [False, True])
def test_ratios_of_references_tell_products_apart(tiles):
    one, two = (np.array(ref.sizes, float)[:4] for ref in references(0, 4096, tiles))
    powers = [p for p in itertools.product(range(3), repeat=4) if 0 < sum(p) <= 4]
    found = {round(float(np.prod((two / one) ** p)), 6) for p in powers}
    assert len(found) == len(powers)
