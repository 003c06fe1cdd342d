"""Which tokens of a chat the assistant says, and so are targets. ``tokenize`` calls it.

Some templates mark the assistant's turns themselves (``{% generation %}``). For all others, turns
are located by rendering the conversation several times, changed in one place, and comparing.

A prompt's render need not be a prefix of the whole one: templates drop reasoning from earlier
turns, and open a thought that the whole render does not hold. So every turn is looked for in the
whole render, and each way of finding its start and its end is one that proves itself; what none of
them proves is refused, never guessed.
"""

from __future__ import annotations

import re
from os.path import commonprefix
from typing import Any

_STAND_IN = "@@qlab says this@@"  # for what the assistant says
_QUESTION = "@@qlab asks this@@"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ADVICE = "set mask_prompt=False to train on every token, or give 'prompt' and 'completion'"

Messages = list[dict[str, Any]]


class MaskError(Exception):
    """The template refuses a conversation, or does not show where the assistant speaks."""


class ChatEncoder:
    """Renders conversations to tokens and masks.

    Args:
        tokenizer: mlx-lm's wrapper, with a chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._inner = getattr(tokenizer, "_tokenizer", tokenizer)  # transformers' own
        ends = [tokenizer.convert_ids_to_tokens(i) for i in sorted(tokenizer.eos_token_ids)]
        self._ends = tuple(end for end in ends if end)  # what may end a turn
        self._special = tuple({*self._ends, *tokenizer.all_special_tokens})
        self._has_offsets = self._offers_offsets()
        self._opening: str | None = None

    def encode(
        self, messages: Messages, tools: Any, turns: list[int] | None
    ) -> tuple[list[int], list[int]]:
        """Return tokens and mask of a conversation.

        Args:
            messages: checked.
            tools: for the template, or None.
            turns: numbers of the messages that are targets, each of the assistant; None makes every
                token one.

        Raises:
            MaskError: see there.
        """
        text = self._render(messages, tools)
        if tools and self._render(messages, None) == text:
            advice = "remove them, or use a model that was made for tools"
            raise MaskError(f"'tools': the chat template does not show them; {advice}")
        if turns is None:
            tokens = self._tokens(text)
            return tokens, [1] * len(tokens)
        assistant = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if turns == assistant:  # the template's marks know no single turns
            marked = self._marked(messages, tools, text)
            if marked is not None:
                return marked
        return self._located(text, [self._span(messages, tools, i, text) for i in turns])

    def _render(self, messages: Messages, tools: Any, prompt: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # templates raise what they like
            raise MaskError(f"'messages': the chat template refuses them: {error}") from None

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    # --- the template's own marks -----------------------------------------------------------------

    def _marked(
        self, messages: Messages, tools: Any, text: str
    ) -> tuple[list[int], list[int]] | None:
        """Tokens and mask by ``{% generation %}``; None where the template has no such marks."""
        # mlx-lm's wrapper may render with a template of its own, in which there are no marks
        if getattr(self.tokenizer, "_chat_template", None) is not None or not self._has_offsets:
            return None
        if not _GENERATION.search(self._inner.get_chat_template(None, tools)):
            return None
        thinking = getattr(self.tokenizer, "_thinking_kwarg", "enable_thinking")
        rendered = self._inner.apply_chat_template(
            messages,
            tools=tools,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **{thinking: getattr(self.tokenizer, "has_thinking", False)},  # as the wrapper sets it
        )
        tokens = list(rendered["input_ids"])
        if tokens != self._tokens(text):
            return None
        return tokens, self._with_ends(tokens, list(rendered["assistant_masks"]))

    def _with_ends(self, tokens: list[int], mask: list[int]) -> list[int]:
        """Make the end of every turn a target: without it a model learns never to stop."""
        ends = set(self.tokenizer.eos_token_ids)
        for i in range(1, len(mask)):
            turn_is_over = mask[i - 1] and not mask[i] and tokens[i - 1] not in ends
            if turn_is_over and tokens[i] in ends:
                mask[i] = 1
        return mask

    # --- found by comparing renders ---------------------------------------------------------------

    def _span(self, messages: Messages, tools: Any, i: int, text: str) -> tuple[int, int]:
        """Characters that the assistant says in turn ``i``, with the mark that ends it."""
        start = self._start(messages, tools, i, text)
        end = self._end(messages, tools, i, text)
        if start is None or end is None or not start < end:
            where = "does not show for certain where the assistant speaks"
            raise MaskError(f"'messages'[{i}]: the chat template {where}; {_ADVICE}")
        return start, end

    def _start(self, messages: Messages, tools: Any, i: int, text: str) -> int | None:
        """First character of turn ``i``; None if nothing proves where it is.

        Three ways, in order: the prompt is a prefix of the whole render; or the render with a
        stand-in for the turn parts from the prompt where the turn begins; or the template's opening
        of a turn stands right before the stand-in.
        """
        prompt = self._render(messages[:i], tools, prompt=True) if i else ""
        if i and text.startswith(prompt):
            return len(prompt)
        stand_in = self._with_stand_in(messages, tools, i)
        if stand_in.count(_STAND_IN) != 1:
            return None
        before = stand_in.partition(_STAND_IN)[0]
        if not i:
            return self._start_by_opening(messages, tools, i, text, self._opened(tools), before)
        asked = self._render(messages[:i], tools)  # without the opening of the assistant's turn
        if stand_in.startswith(asked):
            # the prompt may open what the whole render leaves out, such as a thought: the turn
            # starts where they part
            start = len(commonprefix([prompt, stand_in]))
            is_in_opening = len(asked) <= start <= len(before)
            return start if is_in_opening and text.startswith(stand_in[:start]) else None
        # what came before is rendered differently now
        has_opening = prompt.startswith(asked)
        opening = prompt[len(asked) :] if has_opening else self._opened(tools)
        return self._start_by_opening(messages, tools, i, text, opening, before)

    def _with_stand_in(self, messages: Messages, tools: Any, i: int) -> str:
        """Render with a text in the place of turn ``i`` that stands nowhere else."""
        turn = {"role": "assistant", "content": _STAND_IN}
        return self._render([*messages[:i], turn, *messages[i + 1 :]], tools)

    def _start_by_opening(
        self, messages: Messages, tools: Any, i: int, text: str, opening: str, before: str
    ) -> int | None:
        """Find the opening of a turn in the template's text before it."""
        at = before.rfind(opening)
        if not opening or at < 0:
            return None
        if len(before) - at > self._literal(messages, tools, i, before):
            return None  # it stands in what a user wrote
        start = at + len(opening)
        return start if text.startswith(before[:start]) else None

    def _opened(self, tools: Any) -> str:
        """What the template writes to let the assistant speak."""
        if self._opening is None:
            asked = [{"role": "user", "content": _QUESTION}]
            plain = self._render(asked, tools)
            prompt = self._render(asked, tools, prompt=True)
            self._opening = prompt[len(plain) :] if prompt.startswith(plain) else ""
        return self._opening

    def _literal(self, messages: Messages, tools: Any, i: int, before: str) -> int:
        """How many of the characters before a turn are the template's.

        Those that stay when the message before it changes.
        """
        if not i:
            return len(before)
        other = [
            *messages[: i - 1],
            {**messages[i - 1], "content": _QUESTION},
            {"role": "assistant", "content": _STAND_IN},
            *messages[i + 1 :],
        ]
        changed = self._render(other, tools).partition(_STAND_IN)[0]
        if _QUESTION not in changed:
            return 0
        return len(commonprefix([before[::-1], changed[::-1]]))

    def _end(self, messages: Messages, tools: Any, i: int, text: str) -> int | None:
        """Character after turn ``i`` and its mark; None if nothing proves where it is."""
        is_last = i + 1 == len(messages)
        until_here = text if is_last else self._render(messages[: i + 1], tools)
        end: int | None = len(until_here)
        if not text.startswith(until_here):
            end = self._end_by_tail(messages, tools, i, text)
        if end is None:
            return None
        shorter = text[:end].rstrip()
        if shorter.endswith(self._special):  # a line break after the mark is the template's
            return len(shorter)
        return end + _leading_mark(text[end:], self._ends)

    def _end_by_tail(self, messages: Messages, tools: Any, i: int, text: str) -> int | None:
        """The end of a turn, by what follows it: as the last it would be rendered differently."""
        rest = self._with_stand_in(messages, tools, i).partition(_STAND_IN)[2]
        last = self._with_stand_in(messages[: i + 1], tools, i).partition(_STAND_IN)[2]
        if not rest or not text.endswith(rest):
            return None
        end = len(text) - len(rest)
        if last and rest.startswith(last):
            return end + len(last)
        mark = _leading_mark(rest, self._special)
        return end + mark if mark else None

    # --- characters to tokens ---------------------------------------------------------------------

    def _offers_offsets(self) -> bool:
        """Whether the tokenizer says at which character each token begins and ends.

        And whether it does so for the same tokens that ``encode`` gives.
        """
        if not getattr(self._inner, "is_fast", False):
            return False
        probe = "a b\n\nc"
        encoded = self._inner(probe, add_special_tokens=False, return_offsets_mapping=True)
        return list(encoded["input_ids"]) == self._tokens(probe)

    def _located(self, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
        """Tokens, and which of them overlap a span of characters."""
        if not self._has_offsets:
            tokens = self._tokens(text)
            ranges = [(self._cut(text, a, tokens), self._cut(text, b, tokens)) for a, b in spans]
            return tokens, _mask(len(tokens), ranges)
        encoded = self._inner(text, add_special_tokens=False, return_offsets_mapping=True)
        tokens = list(encoded["input_ids"])
        offsets = encoded["offset_mapping"]
        ranges = [_overlapping(offsets, start, end) for start, end in spans]
        return tokens, _mask(len(tokens), ranges)

    def _cut(self, text: str, at: int, tokens: list[int]) -> int:
        """Tokens before a character, for tokenizers that do not say.

        Those that the text up to there has in common.
        """
        return len(commonprefix([self._tokens(text[:at]), tokens]))


def _leading_mark(text: str, marks: tuple[str, ...]) -> int:
    """Length of a mark that a text begins with, white space before it included.

    0 if there is none.
    """
    blank = len(text) - len(text.lstrip())
    lengths = [len(mark) for mark in marks if text.startswith(mark, blank)]
    return blank + max(lengths) if lengths else 0


def _overlapping(offsets: list[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """First token that reaches into a span of characters, and the one after the last.

    A token of white space may have no width, so it counts by what stands around it.
    """
    numbers = range(len(offsets))
    first = next((k for k in numbers if offsets[k][1] > start), len(offsets))
    last = next((k for k in reversed(numbers) if offsets[k][0] < end), -1)
    return first, last + 1


def _mask(size: int, ranges: list[tuple[int, int]]) -> list[int]:
    """1 within ranges, else 0."""
    mask = [0] * size
    for first, stop in ranges:
        mask[first:stop] = [1] * (stop - first)
    return mask
