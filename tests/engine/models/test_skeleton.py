"""Specs without weights."""

from __future__ import annotations

import time

import mlx.core as mx
import pytest

from qlab.core.config.quant import QuantConfig
from qlab.runtime.job import mlx_call
from qlab.engine.models.skeleton import describe
from qlab.engine.models.skeleton import skeleton
from qlab.errors import LayerNotFoundError
from qlab.errors import LoadError


def llama(layers=32, hidden=4096, ff=14336, heads=32, kv=8, vocab=128256, tied=False):
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": ff,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
    }


def spec_of(config):
    return mlx_call(lambda: describe(skeleton(config), "x"))


@pytest.mark.parametrize(
    ("config", "size"),
    [(llama(), 8_030_261_248), (llama(80, 8192, 28672, 64), 70_553_706_496)],
    ids=["8B", "70B"],
)
def test_spec_of_a_model_that_does_not_exist_is_exact_quick_and_free(config, size):
    before, start = mlx_call(mx.get_active_memory), time.perf_counter()
    spec = spec_of(config)
    assert time.perf_counter() - start < 5
    assert mlx_call(mx.get_active_memory) - before < 1e6
    assert spec.size == size and spec.nbytes == 2 * size
    assert len(spec.layers) == config["num_hidden_layers"] * 7 + 2


def test_tied_head_is_counted_once():
    spec = spec_of(llama(2, 256, 512, 4, 2, 1024, tied=True))
    assert [layer.path for layer in spec.layers if layer.tied] == ["model.embed_tokens"]
    assert len(spec.layers) == 15


def test_width_that_no_group_divides_is_an_obstacle_with_its_reason():
    spec = spec_of(llama(2, 256, 172, 4, 2, 1024))
    layer = spec["model.layers.0.mlp.down_proj"]
    assert "172" in layer.obstacle
    assert layer.nbytes_as(QuantConfig("affine", 4, 32)) == layer.nbytes
    assert spec["model.layers.0.mlp.up_proj"].obstacle is None


def test_experts_are_one_layer_each():
    config = llama(2, 256, 512, 4, 2, 1024) | {
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_theta": 1e4,
    }
    spec = spec_of(config)
    experts = [layer for layer in spec.layers if layer.kind == "switch"]
    assert len(experts) == 6 and experts[0].shape[0] == 4


def test_misspelt_layer_gets_the_nearest():
    spec = spec_of(llama(2, 256, 512, 4, 2, 1024))
    with pytest.raises(LayerNotFoundError, match=r"model\.layers\.0\.mlp\.down_proj"):
        _ = spec["model.layers.0.mlp.down_prj"]


def test_config_without_what_the_architecture_needs_is_refused():
    config = llama()
    del config["hidden_size"]
    with pytest.raises(LoadError, match="hidden_size"):
        spec_of(config)
    with pytest.raises(LoadError, match="no model_type"):
        spec_of({"hidden_size": 4})
