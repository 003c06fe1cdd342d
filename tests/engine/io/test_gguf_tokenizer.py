"""A tokenizer that cannot be rebuilt from a GGUF file is refused with what can."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from qlab.engine.io.gguf_tokenizer import tokenizer
from qlab.errors import LoadError
from qlab.runtime.job import mlx_call

FACTS = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["<end>", "a", "b", "ab", "1", "2"],
    "tokenizer.ggml.merges": ["a b"],
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer.ggml.model": "llama"}, "kind 'llama'"),
        ({"tokenizer.ggml.pre": "other"}, "pre-tokenizer 'other'; .*smollm, llama-bpe, qwen2"),
    ],
)
def test_another_family_is_refused(changes, words):
    with pytest.raises(LoadError, match=words):
        tokenizer(Path("m.gguf"), {**FACTS, **changes})


def test_missing_facts_are_named():
    facts = {key: value for key, value in FACTS.items() if not key.endswith("merges")}
    with pytest.raises(LoadError, match="lacks tokenizer.ggml.merges"):
        tokenizer(Path("m.gguf"), facts)


def test_merges_digits_and_special_tokens_are_as_the_file_says():
    def work():
        special = {
            "tokenizer.ggml.token_type": mx.array([3, 1, 1, 1, 1, 1]),
            "tokenizer.ggml.eos_token_id": mx.array(0),
        }
        wrapper = tokenizer(Path("m.gguf"), {**FACTS, **special})
        return wrapper.encode("ab12<end>"), wrapper.eos_token_id

    assert mlx_call(work) == ([3, 4, 5, 0], 0)
