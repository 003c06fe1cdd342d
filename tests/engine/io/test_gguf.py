"""GGUF files: a real one, and damaged ones that must not end the process."""

from __future__ import annotations


import mlx.core as mx
import numpy as np
import pytest

import qlab
from qlab.engine.io.gguf_header import read_header
from qlab.runtime.job import mlx_call
from qlab.engine.models.surgery import cast
from qlab.engine.models.surgery import twin
from qlab.errors import LoadError


def test_smollm2_knows_the_capital_of_france(smollm2_path):
    model = qlab.load(smollm2_path)
    assert "Q4_1" in model.notes[0]
    assert model.spec.size == 134_515_008
    dense = mlx_call(lambda: cast(twin(model.module), mx.float32))
    from qlab.engine.evaluate.generate import reply

    answer = mlx_call(reply, dense, model.tokenizer, "What is the capital of France?", 12)
    assert answer.startswith("The capital of France is Paris.")


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_written_file_computes_what_its_weights_say(tmp_path, family, kind):
    import gguf
    from mlx.utils import tree_flatten

    from qlab.engine.models.skeleton import skeleton

    config = {
        "model_type": family,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": 260,
        "tie_word_embeddings": False,
        "rope_theta": 1e4,
        "torch_dtype": "float32",
    }

    def build():
        mx.random.seed(0)
        module = skeleton(config)
        mx.eval(module.parameters())
        return module, {k: np.array(v) for k, v in tree_flatten(module.parameters())}

    module, weights = mlx_call(build)
    path = tmp_path / "m.gguf"
    stored = write(gguf, path, family, kind, config, weights)
    model = qlab.load(path)
    tokens = mx.array([[3, 200, 17, 65]])

    def both():
        module.load_weights([(k, mx.array(v)) for k, v in stored.items()])
        return np.array(cast(twin(model.module), mx.float32)(tokens)), np.array(module(tokens))

    got, wanted = mlx_call(both)
    assert np.abs(got - wanted).max() < (1e-4 if kind == "F32" else 0.02) * np.abs(wanted).max()


def write(gguf, path, family, kind, config, weights) -> dict[str, np.ndarray]:
    """Write a model with the reference writer; return the weights as they were stored."""
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "model.layers.": "blk.",
    }
    writer = gguf.GGUFWriter(str(path), family)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_context_length(512)
    alphabet = sorted(__import__("tokenizers").pre_tokenizers.ByteLevel.alphabet())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([*alphabet, "<e>", "<a>", "<b>", "ab"])
    writer.add_token_types([1] * len(alphabet) + [3, 3, 3, 1])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(256)
    stored = {}
    for name, value in weights.items():
        short = name
        for ours, theirs in names.items():
            short = short.replace(ours, theirs)
        q = gguf.GGMLQuantizationType[kind if value.ndim == 2 else "F32"]
        data = gguf.quants.quantize(value, q)
        stored[name] = gguf.quants.dequantize(data, q).astype(np.float32)
        if family == "llama" and ("attn_q" in short or "attn_k" in short):
            heads = 4 if "attn_q" in short else 2
            order = np.arange(value.shape[0]).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
            data = data[order]
        writer.add_tensor(short, data, raw_dtype=q)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def test_type_that_mlx_cannot_read_is_named(tmp_path):
    import gguf

    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tensor(
        "blk.0.ffn_up.weight",
        np.zeros((4, 144), np.uint8),
        raw_dtype=gguf.GGMLQuantizationType.Q4_K,
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(LoadError, match=r"blk\.0\.ffn_up\.weight.*Q4_K.*Q8_0"):
        read_header(path)
