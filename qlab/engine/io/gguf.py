"""Opens GGUF files of the llama and qwen2 families as mlx-lm models, tokenizer included.

Packed blocks are dequantized, so that every scheme can be tried on them. Knows no scheme of the
shelf.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx

from qlab.engine.io.gguf_header import TensorInfo, read_header
from qlab.engine.io.gguf_tokenizer import tokenizer
from qlab.engine.io.loaded import Loaded
from qlab.engine.models.skeleton import skeleton
from qlab.errors import LoadError, nearest

_FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_NAMES = (
    (r"^token_embd\.", "model.embed_tokens."),
    (r"^output_norm\.", "model.norm."),
    (r"^output\.", "lm_head."),
    (r"^blk\.(\d+)\.attn_norm\.", r"model.layers.\1.input_layernorm."),
    (r"^blk\.(\d+)\.ffn_norm\.", r"model.layers.\1.post_attention_layernorm."),
    (r"^blk\.(\d+)\.attn_(q|k)_norm\.", r"model.layers.\1.self_attn.\2_norm."),
    (r"^blk\.(\d+)\.attn_(q|k|v)\.", r"model.layers.\1.self_attn.\2_proj."),
    (r"^blk\.(\d+)\.attn_output\.", r"model.layers.\1.self_attn.o_proj."),
    (r"^blk\.(\d+)\.ffn_(gate|up|down)\.", r"model.layers.\1.mlp.\2_proj."),
)


def load_gguf(path: Path) -> Loaded:
    """Open a GGUF file.

    Args:
        path: of the file; tensors of type F32, F16, Q4_0, Q4_1 and Q8_0 can be read.

    Returns:
        The model in bfloat16, the usual dtype of the originals (float32 if the file's matrices are
        F32).

    Raises:
        LoadError: not GGUF, cut short, of another family or type, or without a usable tokenizer.
    """
    infos = read_header(path)
    arrays, facts = mx.load(str(path), return_metadata=True)
    family = facts.get("general.architecture")
    if family not in _FAMILIES:
        raise LoadError(
            f"{path} is of the family {family!r}; {', '.join(_FAMILIES)} can be read.{nearest(str(family), _FAMILIES)}"
        )
    stored = Counter(info.type for info in infos if len(info.shape) == 2).most_common(1)[0][0]
    dtype = mx.float32 if stored == "F32" else mx.bfloat16
    config = _config(path, facts, family, arrays, infos)
    module = skeleton({**config, "torch_dtype": str(dtype).removeprefix("mlx.core.")})
    weights = _weights(infos, arrays, facts, family, dtype)
    try:
        module.load_weights(list(weights.items()))
    except ValueError as error:
        raise LoadError(f"The tensors of {path} do not make a {family} model: {error}") from error
    mx.eval(module.parameters())
    notes = ()
    if stored.startswith("Q"):
        notes = (
            f"From {stored}: the original 16-bit weights are not in the file, errors are measured against {stored}.",
        )
    return Loaded(module, tokenizer(path, facts), config, path.stem, notes)


def _config(
    path: Path, facts: dict, family: str, arrays: dict, infos: tuple[TensorInfo, ...]
) -> dict[str, Any]:
    def fact(key: str) -> Any:
        value = facts.get(f"{family}.{key}")
        if value is None:
            raise LoadError(
                f"{path} does not say {family}.{key}, without which the model cannot be built."
            )
        return value.item() if isinstance(value, mx.array) else value

    shapes = {info.name: info.shape for info in infos}
    heads = fact("attention.head_count")
    hidden = fact("embedding_length")
    config = {
        "model_type": _FAMILIES[family],
        "hidden_size": hidden,
        "num_hidden_layers": fact("block_count"),
        "intermediate_size": fact("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": fact("attention.head_count_kv"),
        "rms_norm_eps": fact("attention.layer_norm_rms_epsilon"),
        "vocab_size": shapes["token_embd.weight"][1] if "token_embd.weight" in shapes else 0,
        "max_position_embeddings": fact("context_length"),
        "rope_theta": fact("rope.freq_base") if f"{family}.rope.freq_base" in facts else 10000.0,
        "tie_word_embeddings": "output.weight" not in shapes,
    }
    if family == "qwen3":
        config["head_dim"] = fact("attention.key_length")
    for side in ("bos", "eos"):
        token = facts.get(f"tokenizer.ggml.{side}_token_id")
        if token is not None:
            config[f"{side}_token_id"] = token.item()
    return config


def _weights(
    infos: tuple[TensorInfo, ...], arrays: dict, facts: dict, family: str, dtype: mx.Dtype
) -> dict[str, mx.array]:
    heads = facts[f"{family}.attention.head_count"].item()
    kv_heads = facts[f"{family}.attention.head_count_kv"].item()
    found = {}
    for info in infos:
        if info.name == "rope_freqs.weight":
            continue
        value = _dense(info, arrays).astype(dtype)
        if family == "llama" and (side := re.search(r"attn_(q|k)\.", info.name)):
            value = _unpermute(value, heads if side[1] == "q" else kv_heads)
        found[_renamed(info.name)] = value
    return found


def _dense(info: TensorInfo, arrays: dict) -> mx.array:
    if not info.type.startswith("Q"):
        return arrays[info.name]
    stem = info.name.removesuffix("weight")
    return mx.dequantize(
        arrays[info.name],
        arrays[f"{stem}scales"],
        arrays[f"{stem}biases"],
        group_size=32,
        bits=8 if info.type == "Q8_0" else 4,
        dtype=mx.float32,
    )


def _unpermute(rows: mx.array, heads: int) -> mx.array:
    """Undo llama.cpp's order of query and key rows.

    It interleaves the two halves that RoPE rotates.
    """
    order = mx.arange(rows.shape[0]).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
    return rows[order]


def _renamed(name: str) -> str:
    for pattern, target in _NAMES:
        if re.match(pattern, name):
            return re.sub(pattern, target, name)
    raise LoadError(f"The tensor {name!r} has no place in a llama or qwen model.")
