"""A model stored under configs without computing: the same arrays as of the model that is really quantized."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from qlab import registry
from qlab.core.config.quant import QuantConfig
from qlab.engine.models.skeleton import describe
from qlab.engine.models.skeleton import skeleton
from qlab.engine.models.lazy_storage import stored
from tests.tiny import on_mlx, quantized, settings, tiny

STORAGES = [QuantConfig(name) for name in registry.shelf("schemes")]


def layout(module) -> dict[str, tuple]:
    return {path: (array.shape, array.dtype) for path, array in tree_flatten(module.parameters())}


def fitting(spec, config: QuantConfig) -> dict[str, QuantConfig]:
    return {layer.path: config for layer in spec.layers if layer.refusal(config) is None}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "llama tied", "qwen2", "mixtral"])
@pytest.mark.parametrize("config", STORAGES, ids=lambda x: x.mode)
@on_mlx
def test_arrays_and_sizes_are_those_of_the_quantized_model(config, name, dtype):
    module, spec = tiny(name, torch_dtype=dtype)
    made, real = stored(module, fitting(spec, config)), quantized(module, spec, config)
    assert layout(made) == layout(real)
    assert layout(made) != layout(module)
    sizes = [
        [(x.path, x.kind, x.shape, x.nbytes) for x in describe(m, "x").layers] for m in (made, real)
    ]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("config", STORAGES, ids=lambda x: x.mode)
@on_mlx
def test_a_stored_layer_has_the_shapes_and_dtypes_of_a_real_one(config):
    module, spec = tiny(tie_word_embeddings=True, torch_dtype="bfloat16")
    made, real = stored(module, fitting(spec, config)), quantized(module, spec, config)
    tokens = mx.array([[1, 2, 3]])
    assert made(tokens).shape == real(tokens).shape and made(tokens).dtype == real(tokens).dtype


@on_mlx
def test_layers_without_a_config_stay_and_the_model_does_not_change():
    module, spec = tiny("qwen2")
    before = dict(tree_flatten(module.parameters()))
    made = stored(module, {"model.layers.1.self_attn.q_proj": QuantConfig("nf4")})
    arrays = dict(tree_flatten(made.parameters()))
    changed = {path for path, array in arrays.items() if array is not before.get(path)}
    assert changed == {f"model.layers.1.self_attn.q_proj.{name}" for name in ("weight", "absmax")}
    assert "model.layers.1.self_attn.q_proj.bias" in arrays
    assert describe(module, "tiny") == spec
    assert all(array is before[path] for path, array in tree_flatten(module.parameters()))


@on_mlx
def test_storing_a_model_that_does_not_exist_takes_no_memory():
    large = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "num_hidden_layers": 8,
        "head_dim": 128,
    }
    module = skeleton(settings("llama", num_attention_heads=32, **large))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    made = stored(module, fitting(describe(module, "large"), QuantConfig("affine")))
    assert sum(array.nbytes for _, array in tree_flatten(made.parameters())) > 1e9
    assert mx.get_peak_memory() - before < 1e6
