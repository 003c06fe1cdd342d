"""What a model predicts at chosen positions, a chunk of logits at a time, and its most likely answer to a prompt.

Knows neither what is right nor any other model.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qlab.core.rows import foreign
from qlab.engine.job import finished
from qlab.engine.stack import Stack
from qlab.engine.surgery import twin
from qlab.errors import ConfigError, UnsupportedError

CHUNK_NBYTES = 64e6  # of float32 logits that exist at once, for each model
_PREFILL = 512  # tokens of a prompt that pass at once


class Predictor:
    """A model, dropout off.

    Args:
        module: an mlx-lm model; it is not changed.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = twin(module)
        self._module.eval()
        try:
            self._stack: Stack | None = Stack(self._module)
        except UnsupportedError:
            self._stack = None

    @cached_property
    def vocabulary(self) -> int:
        """Outcomes of a prediction."""
        return self.logits(self._rows(mx.zeros((1, 1), mx.int32), lambda x: None)).shape[-1]  # never computed

    def hidden(self, tokens: mx.array, where: mx.array) -> mx.array:
        """Return what ``logits`` takes for chosen positions, evaluated, ``(n, …)``; a block at a time where that can be.

        Args:
            tokens: ``(B, T)``.
            where: positions among all, row after row, integers ``(n,)``.
        """
        rows = self._rows(tokens, mx.eval)[where]  # else the weights of many blocks would be dequantized at once
        mx.eval(rows)
        return rows

    def logits(self, hidden: mx.array) -> mx.array:
        """Return logits of the next token, float32 ``(n, vocabulary)``, lazily."""
        return (self._stack.after(hidden[None])[0] if self._stack is not None else hidden).astype(mx.float32)

    def log_probs(self, hidden: mx.array) -> mx.array:
        """Return log-probabilities of the next token, float32 ``(n, vocabulary)``, lazily."""
        logits = self.logits(hidden)
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)

    def _rows(self, tokens: mx.array, between: Callable[[mx.array], None]) -> mx.array:
        if self._stack is not None:
            try:
                x, calls = self._stack.before(tokens)
            except UnsupportedError:
                self._stack = None
        if self._stack is None:  # then all logits exist at once
            return self._module(tokens).reshape(tokens.size, -1)
        for block, (args, kwargs) in zip(self._stack.blocks, calls, strict=True):
            x = block(x, *args, **kwargs)
            between(x)
        return x.reshape(tokens.size, -1)


def chunk_length(vocabulary: int) -> int:
    """Positions whose logits may exist at once."""
    return max(1, int(CHUNK_NBYTES / (4 * vocabulary)))


def prompt_tokens(tokenizer: Any, prompt: str, vocabulary: int | None = None) -> list[int]:
    """Return the tokens of a prompt: a user's turn, where the tokenizer has a chat template.

    Args:
        tokenizer: mlx-lm's wrapper.
        prompt: a question, or a text to go on with.
        vocabulary: tokens that the model knows; MLX would look up others in foreign memory. None is not checked.

    Raises:
        ConfigError: it is no text, holds no token, or one that the model does not know.
    """
    if not isinstance(prompt, str):
        raise ConfigError(f"prompt={prompt!r} is not legal; it is text.")
    if tokenizer.chat_template is not None:
        tokens = list(tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True))
    else:
        tokens = list(tokenizer.encode(prompt))
    if not tokens:
        raise ConfigError("The prompt is empty, and an answer needs a token to begin with; give a word at least.")
    if fault := foreign(tokens, vocabulary):
        raise ConfigError(f"The prompt cannot be used: {fault}.")
    return tokens


def checked_prompts(tokenizer: Any, prompts: Any, vocabulary: int | None) -> tuple[str, ...]:
    """Return one prompt or several, if a model can answer them.

    Raises:
        ConfigError: see ``prompt_tokens``.
    """
    found = (prompts,) if isinstance(prompts, str) or not isinstance(prompts, Iterable) else tuple(prompts)
    for prompt in found:
        prompt_tokens(tokenizer, prompt, vocabulary)
    return found


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

    tokens, cache = prompt_tokens(tokenizer, prompt, vocabulary), make_prompt_cache(module)
    for start in range(0, len(tokens) - 1, _PREFILL):
        module(mx.array([tokens[start : min(start + _PREFILL, len(tokens) - 1)]]), cache=cache)
        mx.eval([layer.state for layer in cache])  # the logits are never computed
    last, written = tokens[-1], []
    while len(written) < max_tokens:
        last = module(mx.array([[last]]), cache=cache)[0, -1].argmax().item()
        if last in tokenizer.eos_token_ids:
            break
        written.append(last)
        yield len(written)
    return tokenizer.decode(written)


def reply(module: nn.Module, tokenizer: Any, prompt: str, max_tokens: int, vocabulary: int | None = None) -> str:
    """Return what ``answer`` writes.

    Raises:
        ConfigError: see ``prompt_tokens``; or ``max_tokens`` is no number above 0.
    """
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
        raise ConfigError(f"max_tokens={max_tokens!r} is not legal; it is a whole number, 1 or more.")
    return finished(answer(module, tokenizer, prompt, max_tokens, vocabulary))
