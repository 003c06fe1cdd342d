"""Strides tell whether an array lies without gaps, and whether a reshape needs a copy."""

from __future__ import annotations

import numpy as np
import pytest

from qlab.core.graph.strides import dense_strides, gapless_elements, is_dense, regrouped_strides

ARRAYS = {
    "dense": np.zeros((4, 3, 2), np.int8),
    "turned": np.zeros((4, 3, 2), np.int8).T,
    "inner axes turned": np.zeros((4, 3, 2), np.int8).swapaxes(1, 2),
    "every other column": np.zeros((4, 6), np.int8)[:, ::2],
    "axes of one": np.zeros((1, 12, 1), np.int8),
    "repeated": np.broadcast_to(np.zeros((3, 1), np.int8), (3, 4)),
}
each_array = pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS)


@each_array
def test_dense_is_what_numpy_calls_contiguous(array):
    assert is_dense(array.shape, array.strides) == array.flags.c_contiguous
    assert is_dense(array.shape, dense_strides(array.shape))


def test_gapless_arrays_span_their_stored_elements():
    spans = {name: gapless_elements(a.shape, a.strides) for name, a in ARRAYS.items()}
    assert spans == {
        "dense": 24,
        "turned": 24,
        "inner axes turned": 24,
        "every other column": 0,
        "axes of one": 12,
        "repeated": 3,
    }


@each_array
@pytest.mark.parametrize("to", [(24,), (12,), (2, 12), (8, 3), (2, 2, 3, 2), (4, 3), (3, 4)])
def test_a_reshape_needs_no_copy_where_numpy_makes_none(array, to):
    if np.prod(to) != array.size:
        return
    reshaped = array.reshape(to)
    is_view = np.shares_memory(reshaped, array)
    strides = regrouped_strides(array.shape, array.strides, to)
    assert (strides is not None) == is_view
    if is_view:
        assert strides == reshaped.strides
