"""What every solver on the shelf must do: a new file is tested by standing there."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from qlab import QuantConfig, registry
from qlab.errors import ConfigError
from tests.tiny import on_mlx

KINDS = list(registry.shelf("solvers").values())
CONFIGS = [QuantConfig(mode) for mode in registry.shelf("schemes")]


def name(value) -> str:
    return getattr(value, "name", None) or value.label


def weights(seed: int) -> mx.array:
    return mx.random.normal((16, 128), key=mx.random.key(seed)).astype(mx.bfloat16)


def output_error(config: QuantConfig, weight: mx.array, packed: dict, power: mx.array) -> float:
    """Squared error of the layer's outputs, for inputs of these mean squares."""
    dequantized = config.scheme.dequantize(packed, config, mx.float32)
    difference = dequantized - weight.astype(mx.float32)
    return (mx.square(difference) * power).sum().item()


def fills(kind, config: QuantConfig) -> bool:
    return kind.modes is None or config.mode in kind.modes


@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_it_says_what_it_does_and_what_it_needs(kind):
    assert kind.title
    assert kind.needs_inputs in (True, False)
    assert kind.modes is None or set(kind.modes) <= set(registry.shelf("schemes"))


@pytest.mark.parametrize("config", CONFIGS, ids=name)
@pytest.mark.parametrize("kind", KINDS, ids=name)
@on_mlx
def test_packed_arrays_are_those_that_the_scheme_lays_out_or_it_is_refused(kind, config):
    weight = weights(0)
    if not fills(kind, config):
        with pytest.raises(ConfigError, match=config.mode):
            kind.solve(weight, config)
        return
    packed = kind.solve(weight, config)
    layout = config.scheme.layout(weight.shape, config, "bfloat16")
    assert {key: (array.shape, str(array.dtype).removeprefix("mlx.core.")) for key, array in packed.items()} == {
        key: (tuple(shape), dtype) for key, (shape, dtype) in layout.items()
    }  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=name)
@pytest.mark.parametrize("kind", KINDS, ids=name)
@on_mlx
def test_no_worse_than_rounding_for_the_inputs_it_was_told_of(kind, config):
    if not fills(kind, config):
        return
    weight = weights(1)
    power = mx.exp(mx.random.normal((128,), key=mx.random.key(2)))
    rounded = registry.get("solvers", "rtn").solve(weight, config)
    solved = kind.solve(weight, config, power)
    least = output_error(config, weight, rounded, power)
    assert output_error(config, weight, solved, power) <= least * 1.001


@pytest.mark.parametrize("kind", KINDS, ids=name)
@on_mlx
def test_stacked_weights_are_solved_one_by_one(kind):
    config = QuantConfig("affine", 4, 64)
    stacked = mx.stack([weights(3), weights(4)])
    together = kind.solve(stacked, config)
    alone = kind.solve(stacked[1], config)
    for key, array in alone.items():
        assert np.array_equal(
            np.array(together[key][1].view(mx.uint8)), np.array(array.view(mx.uint8))
        )
