"""Rebuilds a tokenizer from the metadata of a GGUF file (byte-level BPE families).

``gguf`` calls it. GGUF keeps vocabulary and merges, but only the *name* of the rule that cuts text
into words before BPE; so the rules that are known stand here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

from qlab.errors import LoadError

_NORMAL = 1  # ggml token types
_SPECIAL = (3, 4)  # control, user defined
_NEEDED = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges")
_NAMED_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
# known rules by tokenizer.ggml.pre → longest run of digits that stays together
_DIGITS = {"smollm": 1, "llama-bpe": 3, "qwen2": 1}
# how llama 3 and qwen cut text: contractions, words, digits, punctuation, line breaks, blanks
_SPLIT = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,%d}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def tokenizer(path: Path, facts: dict[str, Any]) -> Any:
    """Return mlx-lm's tokenizer wrapper, made from GGUF metadata.

    Args:
        path: of the file, for errors.
        facts: its metadata, as ``mx.load`` returns them.

    Raises:
        LoadError: a tokenizer family other than byte-level BPE with a known pre-tokenizer.
    """
    from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper
    from transformers import PreTrainedTokenizerFast

    _refuse_unknown(path, facts)
    tokens = facts["tokenizer.ggml.tokens"]
    named = {}
    for side, key in _NAMED_TOKENS.items():
        number = facts.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None:
            named[f"{side}_token"] = tokens[number.item()]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=_byte_level_bpe(facts),
        clean_up_tokenization_spaces=False,
        chat_template=facts.get("tokenizer.chat_template"),
        **named,
    )
    detokenizer: Any = BPEStreamingDetokenizer  # mlx-lm's type is that of its default alone
    return TokenizerWrapper(fast, detokenizer)


def _refuse_unknown(path: Path, facts: dict[str, Any]) -> None:
    kind = facts.get("tokenizer.ggml.model")
    rule = facts.get("tokenizer.ggml.pre")
    missing = [key for key in _NEEDED if key not in facts]
    if kind == "gpt2" and missing:
        raise LoadError(
            f"{path} lacks {' and '.join(missing)}, so its tokenizer cannot be rebuilt."
        )
    if kind != "gpt2" or rule not in _DIGITS:
        raise LoadError(
            f"{path} has a tokenizer of kind {kind!r} with pre-tokenizer {rule!r}; byte-level BPE "
            f"(gpt2) with {', '.join(_DIGITS)} can be rebuilt. Open the original folder instead."
        )


def _byte_level_bpe(facts: dict[str, Any]) -> Any:
    """Return a ``tokenizers.Tokenizer``."""
    from tokenizers import Tokenizer, decoders, models, processors

    tokens = facts["tokenizer.ggml.tokens"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(pair.split(" ", 1)) for pair in facts["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False))
    bpe.pre_tokenizer = _pre_tokenizer(facts["tokenizer.ggml.pre"])
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    bpe.add_special_tokens(_special_tokens(facts, tokens))
    return bpe


def _special_tokens(facts: dict[str, Any], tokens: list[str]) -> list[str]:
    types = facts.get("tokenizer.ggml.token_type")
    kinds: Any = [_NORMAL] * len(tokens)
    if isinstance(types, mx.array):
        kinds = types.tolist()
    return [token for token, kind in zip(tokens, kinds, strict=True) if kind in _SPECIAL]


def _pre_tokenizer(rule: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    if rule == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    split = pre_tokenizers.Split(Regex(_SPLIT % _DIGITS[rule]), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, to_bytes])
