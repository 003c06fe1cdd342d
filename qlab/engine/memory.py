"""Generates text, and gives memory back. Knows no scheme."""

from __future__ import annotations

import gc
from typing import Any

import mlx.core as mx
import mlx.nn as nn


def generate(module: nn.Module, tokenizer: Any, prompt: str, max_tokens: int) -> str:
    """Return the greedy continuation of a prompt, or the answer if the tokenizer has a chat template."""
    from mlx_lm import generate as run

    if tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return run(module, tokenizer, prompt, max_tokens=max_tokens)


def release(expected_nbytes: int) -> str:
    """Collect garbage and empty MLX's cache; say what came back and what did not."""
    before = mx.get_active_memory() + mx.get_cache_memory()
    gc.collect()
    mx.clear_cache()
    after = mx.get_active_memory() + mx.get_cache_memory()
    text = f"{max(before - after, 0) / 1e9:.3f} GB given back, {after / 1e9:.3f} GB still held by MLX."
    if after > 0.5 * expected_nbytes:
        text += " Other models, quantizers made from this one, or IPython's Out and _ may hold the rest."
    return text
