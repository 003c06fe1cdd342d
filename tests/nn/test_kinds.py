"""One place says what kind of layer a module is, whatever its storage."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest

from qlab.core.config.quant import QuantConfig
from qlab.nn.kinds import is_layer, layer_kind
from qlab.nn.stored import dense_layer, stored_layer
from tests.tiny import on_mlx

SHAPES = {"linear": (64, 64), "embedding": (64, 64), "switch": (2, 64, 64)}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("mode", ["affine", "mxfp4", "nf4", "nvfp4"])
@on_mlx
def test_the_kind_is_the_same_stored_and_dense(mode, kind):
    config = QuantConfig(mode)
    weight = mx.random.normal(SHAPES[kind])
    packed = config.scheme.quantize(weight, config)
    layer = stored_layer(packed, config, weight.shape, weight.dtype, kind)
    assert is_layer(layer) and layer_kind(layer) == kind
    assert layer_kind(dense_layer(layer, weight)) == kind


@on_mlx
def test_what_is_no_layer_is_none_and_has_no_kind():
    norm = nn.RMSNorm(8)
    assert not is_layer(norm) and not is_layer([]) and not is_layer(nn.Module())
    with pytest.raises(TypeError, match="RMSNorm is no linear layer"):
        layer_kind(norm)
