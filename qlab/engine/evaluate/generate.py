"""Prompts → tokens → answers: greedy generation, a token at a time.

``Model.generate``, ``Adapter.generate``, ``Trainer.generate`` and the evaluation of models side by
side use it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qlab.core.config.legal import check_whole
from qlab.core.train.rows import outside_vocabulary
from qlab.errors import ConfigError
from qlab.runtime.job import run_to_end

_PREFILL = 512  # tokens of a prompt that pass at once


def prompt_tokens(tokenizer: Any, prompt: str, vocabulary: int | None = None) -> list[int]:
    """Return the tokens of a prompt: a user's turn, where the tokenizer has a chat template.

    Args:
        tokenizer: mlx-lm's wrapper.
        prompt: a question, or a text to go on with.
        vocabulary: tokens that the model knows; MLX would look up others in foreign memory. None is
            not checked.

    Raises:
        ConfigError: it is no text, holds no token, or one that the model does not know.
    """
    if not isinstance(prompt, str):
        raise ConfigError(f"prompt={prompt!r} is not legal; it is text.")
    if tokenizer.chat_template is None:
        tokens = list(tokenizer.encode(prompt))
    else:
        turn = {"role": "user", "content": prompt}
        tokens = list(tokenizer.apply_chat_template([turn], add_generation_prompt=True))
    if not tokens:
        raise ConfigError(
            "The prompt is empty, and an answer needs a token to begin with; give a word at least."
        )
    fault = outside_vocabulary(tokens, vocabulary)
    if fault:
        raise ConfigError(f"The prompt cannot be used: {fault}.")
    return tokens


def checked_prompts(tokenizer: Any, prompts: Any, vocabulary: int | None) -> tuple[str, ...]:
    """Return one prompt or several as a tuple, if a model can answer them.

    Raises:
        ConfigError: see ``prompt_tokens``.
    """
    several: tuple[Any, ...] = (prompts,)
    if isinstance(prompts, Iterable) and not isinstance(prompts, str):
        several = tuple(prompts)
    for prompt in several:
        prompt_tokens(tokenizer, prompt, vocabulary)
    return several


def answer(
    module: nn.Module, tokenizer: Any, prompt: str, max_tokens: int, vocabulary: int | None = None
) -> Generator[int, None, str]:
    """Write the most likely continuation, a token at a time. The wired limit stays as it is.

    Args:
        module: an mlx-lm model, dropout off.
        tokenizer: mlx-lm's wrapper.
        prompt: see ``prompt_tokens``.
        max_tokens: tokens to write at most.
        vocabulary: see ``prompt_tokens``.

    Yields:
        The number of tokens written.

    Raises:
        ConfigError: see ``prompt_tokens``.
    """
    from mlx_lm.models.cache import make_prompt_cache

    model: Any = module
    *prefix, last = prompt_tokens(tokenizer, prompt, vocabulary)
    cache = make_prompt_cache(module)
    for start in range(0, len(prefix), _PREFILL):
        part = prefix[start : start + _PREFILL]
        model(mx.array([part]), cache=cache)
        mx.eval([layer.state for layer in cache])  # the logits are never computed
    written: list[int] = []
    while len(written) < max_tokens:
        logits = model(mx.array([[last]]), cache=cache)[0, -1]  # (vocabulary,)
        last = int(logits.argmax().item())
        if last in tokenizer.eos_token_ids:
            break
        written.append(last)
        yield len(written)
    return tokenizer.decode(written)


def reply(
    module: nn.Module, tokenizer: Any, prompt: str, max_tokens: int, vocabulary: int | None = None
) -> str:
    """Return what ``answer`` writes.

    Raises:
        ConfigError: see ``prompt_tokens``; or ``max_tokens`` is no whole number above 0.
    """
    check_whole("max_tokens", max_tokens, 1)
    return run_to_end(answer(module, tokenizer, prompt, max_tokens, vocabulary))
