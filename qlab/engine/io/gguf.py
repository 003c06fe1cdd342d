"""Opens GGUF files of the llama and qwen families as mlx-lm models, tokenizer included.

``load`` calls it. MLX unpacks the file's blocks into its own affine layout; they are dequantized
here, so that every scheme can be tried on the weights.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from qlab.engine.io.gguf_header import TensorInfo, read_header
from qlab.engine.io.gguf_tokenizer import tokenizer
from qlab.engine.io.loaded import Loaded
from qlab.engine.models.skeleton import skeleton
from qlab.errors import LoadError, nearest

_FAMILIES = ("llama", "qwen2", "qwen3")  # of GGUF; mlx-lm's model_type has the same names
_DERIVED = "rope_freqs.weight"  # mlx-lm computes it from the config
_GROUP_SIZE = 32  # weights in a block of Q4_0, Q4_1 and Q8_0
_BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
# GGUF's name of a tensor → mlx-lm's
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
    infos = read_header(path)  # first: MLX trusts the header, and a wrong one ends the process
    loaded: Any = mx.load(str(path), return_metadata=True)  # a pair, which its type does not say
    arrays, metadata = loaded
    family = metadata.get("general.architecture")
    if family not in _FAMILIES:
        known = f"{', '.join(_FAMILIES)} can be read.{nearest(str(family), _FAMILIES)}"
        raise LoadError(f"{path} is of the family {family!r}; {known}")
    facts = _Facts(path, family, metadata)
    storage = _storage_of_matrices(infos)
    dtype = mx.float32 if storage == "F32" else mx.bfloat16
    config = _config(facts, infos)
    module = skeleton({**config, "torch_dtype": str(dtype).removeprefix("mlx.core.")})
    weights = _weights(infos, arrays, config, dtype)
    try:
        module.load_weights(list(weights.items()))
    except ValueError as error:
        raise LoadError(f"The tensors of {path} do not make a {family} model: {error}") from error
    mx.eval(module.parameters())
    return Loaded(
        module=module,
        tokenizer=tokenizer(path, metadata),
        config=config,
        name=path.stem,
        notes=_notes(storage),
    )


def _storage_of_matrices(infos: tuple[TensorInfo, ...]) -> str:
    """Type of most matrices; norms are F32 in every file."""
    types = Counter(info.type for info in infos if len(info.shape) == 2)
    return types.most_common(1)[0][0]


def _notes(storage: str) -> tuple[str, ...]:
    if storage not in _BITS:
        return ()
    return (
        f"From {storage}: the original 16-bit weights are not in the file, errors are measured "
        f"against {storage}.",
    )


@dataclass(frozen=True)
class _Facts:
    """The metadata of a file, whose keys begin with its family."""

    path: Path
    family: str
    metadata: dict[str, Any]

    def has(self, key: str) -> bool:
        return f"{self.family}.{key}" in self.metadata

    def number(self, key: str) -> Any:
        """Value of a key; raises LoadError if the file has none."""
        name = f"{self.family}.{key}"
        value = self.metadata.get(name)
        if value is None:
            reason = "without which the model cannot be built"
            raise LoadError(f"{self.path} does not say {name}, {reason}.")
        return value.item() if isinstance(value, mx.array) else value


def _config(facts: _Facts, infos: tuple[TensorInfo, ...]) -> dict[str, Any]:
    """Say in the terms of a config.json what the metadata say."""
    shapes = {info.name: info.shape for info in infos}
    embedding = shapes.get("token_embd.weight", (0, 0))  # (width, vocabulary): fastest first
    config = {
        "model_type": facts.family,
        "hidden_size": facts.number("embedding_length"),
        "num_hidden_layers": facts.number("block_count"),
        "intermediate_size": facts.number("feed_forward_length"),
        "num_attention_heads": facts.number("attention.head_count"),
        "num_key_value_heads": facts.number("attention.head_count_kv"),
        "rms_norm_eps": facts.number("attention.layer_norm_rms_epsilon"),
        "vocab_size": embedding[1],
        "max_position_embeddings": facts.number("context_length"),
        "rope_theta": facts.number("rope.freq_base") if facts.has("rope.freq_base") else 10000.0,
        "tie_word_embeddings": "output.weight" not in shapes,
    }
    if facts.family == "qwen3":
        config["head_dim"] = facts.number("attention.key_length")
    for side in ("bos", "eos"):
        token = facts.metadata.get(f"tokenizer.ggml.{side}_token_id")
        if token is not None:
            config[f"{side}_token_id"] = token.item()
    return config


def _weights(
    infos: tuple[TensorInfo, ...],
    arrays: dict[str, mx.array],
    config: dict[str, Any],
    dtype: mx.Dtype,
) -> dict[str, mx.array]:
    """Dense weights under mlx-lm's names."""
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    weights = {}
    for info in infos:
        if info.name == _DERIVED:
            continue
        value = _dense(info, arrays).astype(dtype)
        side = re.search(r"attn_(q|k)\.", info.name)
        if side and config["model_type"] == "llama":
            value = _unpermute(value, heads[side[1]])
        weights[_renamed(info.name)] = value
    return weights


def _dense(info: TensorInfo, arrays: dict[str, mx.array]) -> mx.array:
    """One tensor as MLX read it, or dequantized: MLX splits a block into codes, scales, biases."""
    if info.type not in _BITS:
        return arrays[info.name]
    stem = info.name.removesuffix("weight")
    return mx.dequantize(
        arrays[info.name],
        arrays[f"{stem}scales"],
        arrays[f"{stem}biases"],
        group_size=_GROUP_SIZE,
        bits=_BITS[info.type],
        dtype=mx.float32,
    )


def _unpermute(rows: mx.array, heads: int) -> mx.array:
    """Undo llama.cpp's order of query and key rows.

    It interleaves the two halves of a head that RoPE rotates; transformers and mlx-lm keep one half
    after the other. Source: ``permute`` in llama.cpp's convert_hf_to_gguf.py.

    Args:
        rows: weight ``(heads * head_dim, in)``.
        heads: query heads, or key-value heads.
    """
    order = mx.arange(rows.shape[0]).reshape(heads, -1, 2)  # (head, pair, half)
    order = order.swapaxes(1, 2).reshape(-1)  # (head, half, pair)
    return rows[order]


def _renamed(name: str) -> str:
    for pattern, target in _NAMES:
        if re.match(pattern, name):
            return re.sub(pattern, target, name)
    raise LoadError(f"The tensor {name!r} has no place in a llama or qwen model.")
