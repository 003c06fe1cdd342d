"""What a save returns prints as its sentence, is a string for old code, and copies."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

from qlab.core.saved import Saved

SENTENCE = "Saved as an mlx-lm folder; mlx_lm.load and qlab.load open it."


def saved() -> Saved:
    return Saved(SENTENCE, path="/models/a", opens_in=("mlx-lm", "qlab"))


def test_it_prints_as_its_sentence():
    assert str(saved()) == repr(saved()) == f"{saved()}" == SENTENCE


def test_it_is_a_string_as_it_was_before():
    assert saved() == SENTENCE and "mlx_lm.load" in saved() and isinstance(saved(), str)
    assert type(saved().note) is str and saved().note == SENTENCE


def test_a_script_asks_it_for_facts():
    assert saved().path == Path("/models/a")
    assert saved().opens_in == ("mlx-lm", "qlab")


def test_it_copies_and_pickles():
    for twin in (copy.deepcopy(saved()), copy.copy(saved()), pickle.loads(pickle.dumps(saved()))):
        assert twin == saved() and isinstance(twin, Saved)
        assert (twin.path, twin.opens_in) == (saved().path, saved().opens_in)
