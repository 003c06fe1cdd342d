"""Rebuilds a tokenizer from the metadata of a GGUF file (byte-level BPE families).

Knows no weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

from qlab.errors import LoadError

_CONTROL = (3, 4)  # ggml token types: control, user defined
# how words are cut before BPE, by tokenizer.ggml.pre; digits is the longest run of digits kept
# together
_DIGITS = {"smollm": 1, "llama-bpe": 3, "qwen2": 1}
_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,%d}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def tokenizer(path: Path, facts: dict[str, Any]) -> Any:
    """Return mlx-lm's tokenizer wrapper, made from GGUF metadata.

    Raises:
        LoadError: a tokenizer family other than byte-level BPE with a known pre-tokenizer.
    """
    from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper
    from tokenizers import Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    kind = facts.get("tokenizer.ggml.model")
    pre = facts.get("tokenizer.ggml.pre")
    missing = [
        key for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges") if key not in facts
    ]
    if kind == "gpt2" and missing:
        raise LoadError(
            f"{path} lacks {' and '.join(missing)}, so its tokenizer cannot be rebuilt."
        )
    if kind != "gpt2" or pre not in _DIGITS:
        raise LoadError(
            f"{path} has a tokenizer of kind {kind!r} with pre-tokenizer {pre!r}; byte-level BPE (gpt2) with "
            f"{', '.join(_DIGITS)} can be rebuilt. Open the original folder instead."
        )
    tokens = facts["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ", 1)) for pair in facts["tokenizer.ggml.merges"]]
    made = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)}, merges=merges, fuse_unk=False
        )
    )
    made.pre_tokenizer = _pre_tokenizer(pre)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    types = facts.get("tokenizer.ggml.token_type")
    kinds = types.tolist() if isinstance(types, mx.array) else [1] * len(tokens)
    made.add_special_tokens(
        [token for token, number in zip(tokens, kinds, strict=True) if number in _CONTROL]
    )
    named = {}
    for side, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = facts.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None:
            named[f"{side}_token"] = tokens[number.item()]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made,
        clean_up_tokenization_spaces=False,
        chat_template=facts.get("tokenizer.chat_template"),
        **named,
    )
    return TokenizerWrapper(fast, BPEStreamingDetokenizer)


def _pre_tokenizer(pre: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    if pre == "smollm":
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    split = pre_tokenizers.Split(Regex(_SPLIT % _DIGITS[pre]), behavior="isolated")
    return pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
