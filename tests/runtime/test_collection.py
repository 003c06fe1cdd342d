"""The garbage collector is paused within, and afterwards as it was."""

from __future__ import annotations

import gc

import pytest

from qlab.runtime.collection import paused_collection


@pytest.fixture(autouse=True)
def collector():
    yield
    gc.enable()


@pytest.mark.parametrize("enabled", [True, False])
def test_collector_is_off_within_and_as_it_was_afterwards(enabled):
    if not enabled:
        gc.disable()
    with paused_collection():
        assert not gc.isenabled()
    assert gc.isenabled() is enabled


def test_collector_is_back_after_an_error():
    with pytest.raises(RuntimeError), paused_collection():
        raise RuntimeError
    assert gc.isenabled()
