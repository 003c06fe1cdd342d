"""When arrays of an adapter still fit, and when they are made anew."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qlab.core.config.lora import LoRAConfig
from qlab.errors import ConfigError
from qlab.lab.adapter_arrays import AdapterArrays
from qlab.lab.adapter_arrays import TrainedOn

DEFAULT = LoRAConfig(rank=4)
COMPENSATING = LoRAConfig(rank=4, init="residual")


@pytest.fixture
def made():
    return []


def arrays_of(arrays, config, storage, made):
    return arrays.get(config, storage, lambda: made.append(config) or {"a": len(made)})


def test_default_arrays_depend_on_their_shape_alone(made):
    arrays = AdapterArrays()
    arrays_of(arrays, DEFAULT, "4-bit", made)
    arrays_of(arrays, replace(DEFAULT, scale=9.0, dropout=0.1), "3-bit", made)
    assert len(made) == 1
    assert arrays_of(arrays, replace(DEFAULT, rank=8), "3-bit", made) == {"a": 2}


def test_compensating_arrays_follow_the_storage_and_the_scale(made):
    arrays = AdapterArrays()
    arrays_of(arrays, COMPENSATING, "4-bit", made)
    arrays_of(arrays, COMPENSATING, "4-bit", made)
    assert len(made) == 1
    arrays_of(arrays, COMPENSATING, "3-bit", made)
    arrays_of(arrays, replace(COMPENSATING, scale=1.0), "3-bit", made)
    assert len(made) == 3


def test_trained_arrays_stay_until_they_are_dropped(made):
    arrays = AdapterArrays()
    arrays.take({"a": "trained"}, COMPENSATING, TrainedOn("4-bit", None), "run, step 3")
    assert arrays_of(arrays, replace(COMPENSATING, scale=1.0), "3-bit", made) == {"a": "trained"}
    with pytest.raises(ConfigError, match=r"Another rank would lose .*run, step 3"):
        arrays.check(replace(COMPENSATING, rank=8))
    version = arrays.version
    arrays.drop()
    arrays.check(replace(COMPENSATING, rank=8))
    assert arrays.version > version and arrays.trained_on is None and not arrays.origin
    assert arrays_of(arrays, COMPENSATING, "4-bit", made) == {"a": 1}


def test_the_adapted_model_is_made_anew_after_a_change(made):
    arrays = AdapterArrays()

    def adapted(config):
        return arrays.adapted(config, "4-bit", lambda: made.append(config) or len(made))

    assert adapted(DEFAULT) == adapted(replace(DEFAULT, dropout=0.5)) == 1
    assert adapted(replace(DEFAULT, scale=1.0)) == 2
    arrays.take({}, DEFAULT, TrainedOn("4-bit", None), "run")
    assert adapted(DEFAULT) == 3
