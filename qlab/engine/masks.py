"""Which tokens of a chat are the assistant's, for every template: its own marks, or the spans found by replacing the turns.

A prompt's render need not be a prefix of the whole one (templates drop reasoning from earlier turns, add a system message),
so each assistant turn is found in the one whole render: it is the text that changes, and only that, when the turn's content
is replaced by another. What cannot be found with certainty is refused. Knows no model.
"""

from __future__ import annotations

from typing import Any

_MARKS = ("⁣qlab⁣a⁣", "⁣qlab⁣b⁣")


class MaskError(Exception):
    """The assistant's part of a row cannot be told from the rest."""


def chat(tokenizer: Any, messages: list[dict[str, Any]], tools: Any, mask_prompt: bool) -> tuple[list[int], list[int]]:
    """Return tokens and mask of a conversation.

    Args:
        tokenizer: mlx-lm's wrapper, with a chat template.
        messages: checked.
        tools: for the template, or None.
        mask_prompt: whether only what the assistant says, to the end of its turn, is a target.

    Raises:
        MaskError: the template refuses the conversation, or its render does not show where the assistant speaks.
    """
    text = _render(tokenizer, messages, tools)
    spans = _spans(tokenizer, messages, tools, text) if mask_prompt else [(0, len(text))]
    inner = getattr(tokenizer, "_tokenizer", tokenizer)
    if not getattr(inner, "is_fast", False):
        return _by_pieces(tokenizer, text, spans)
    made = inner(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = [int(any(start < end and start < b and end > a for a, b in spans)) for start, end in made["offset_mapping"]]
    return list(made["input_ids"]), mask


def _by_pieces(tokenizer: Any, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Tokens piece by piece, for tokenizers that do not say where a token stands."""
    tokens: list[int] = []
    mask: list[int] = []
    at = 0
    for a, b in [*spans, (len(text), len(text))]:
        for part, target in ((text[at:a], 0), (text[a:b], 1)):
            made = list(tokenizer.encode(part, add_special_tokens=False)) if part else []
            tokens += made
            mask += [target] * len(made)
        at = b
    return tokens, mask


def _render(tokenizer: Any, messages: list[dict[str, Any]], tools: Any) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=False)
    except Exception as error:  # jinja and templates raise many kinds
        raise MaskError(f"'messages': the chat template refuses them: {error}") from None


def _spans(tokenizer: Any, messages: list[dict[str, Any]], tools: Any, text: str) -> list[tuple[int, int]]:
    """Characters of the whole render that the assistant says, each turn with the mark that ends it."""
    found = []
    for n, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start, end = _changed(tokenizer, messages, tools, n, text)
        found.append((start, _turn_end(tokenizer, messages, tools, n, text, end)))
    return found


def _changed(tokenizer: Any, messages: list[dict[str, Any]], tools: Any, n: int, text: str) -> tuple[int, int]:
    """Where the render changes when a turn says something else."""
    renders = []
    for mark in _MARKS:
        other = [*messages[:n], {"role": "assistant", "content": mark}, *messages[n + 1 :]]
        renders.append(_render(tokenizer, other, tools))
    places = [render.find(mark) for render, mark in zip(renders, _MARKS, strict=True)]
    if -1 in places or places[0] != places[1]:
        raise MaskError(f"'messages'[{n}]: the chat template does not show what the assistant says")
    head = places[0]
    tail = len(renders[0]) - head - len(_MARKS[0])
    rest = renders[0][head + len(_MARKS[0]) :]
    if text[:head] != renders[0][:head] or (tail and not text.endswith(rest)) or len(text) - tail <= head:
        raise MaskError(
            f"'messages'[{n}]: the chat template renders other turns differently when this one changes, so it cannot be told "
            "where the assistant speaks; set mask_prompt=False or give 'prompt' and 'completion'"
        )
    return head, len(text) - tail


def _turn_end(tokenizer: Any, messages: list[dict[str, Any]], tools: Any, n: int, text: str, end: int) -> int:
    """The end of a turn: its content and the end-of-turn mark after it, but not what opens the next turn."""
    alone = _render(tokenizer, messages[: n + 1], tools)
    rest, after = text[end:], ""
    eos = getattr(tokenizer, "eos_token", None) or ""
    if eos and rest.lstrip("\n ").startswith(eos):
        return end + rest.index(eos) + len(eos)
    for k in range(1, len(rest) + 1):  # what a conversation that ends here has after the content
        if alone.endswith(rest[:k]):
            after = rest[:k]
    return end + len(after.rstrip("\n"))
