"""Which tokens of a chat the assistant says.

By the template's own marks, or found by comparing renders. Knows no rows.

A prompt's render need not be a prefix of the whole one: templates drop reasoning from earlier
turns, and open a thought that the whole render does not hold. So every turn is looked for in the
whole render, and each way of finding its start and its end is one that proves itself; what none of
them proves is refused, never guessed.
"""

from __future__ import annotations

import re
from os.path import commonprefix
from typing import Any

_SAID = "@@qlab says this@@"  # stands in for what the assistant says
_ASKED = "@@qlab asks this@@"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ADVICE = "set mask_prompt=False to train on every token, or give 'prompt' and 'completion'"

Messages = list[dict[str, Any]]


class MaskError(Exception):
    """The template refuses a conversation, or does not show where the assistant speaks."""


class Chats:
    """Renders conversations to tokens and masks.

    Args:
        tokenizer: mlx-lm's wrapper, with a chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._inner = getattr(tokenizer, "_tokenizer", tokenizer)
        ends = [tokenizer.convert_ids_to_tokens(i) for i in sorted(tokenizer.eos_token_ids)]
        self._ends = [end for end in ends if end]  # what may end a turn
        self._special = tuple({*self._ends, *tokenizer.all_special_tokens})
        self._says_where = self._offers_offsets()
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
            raise MaskError(
                "'tools': the chat template does not show them; remove them, or use a model that was made for tools"
            )
        if turns is None:
            tokens = self._tokens(text)
            return tokens, [1] * len(tokens)
        if turns == [i for i, message in enumerate(messages) if message["role"] == "assistant"]:
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
        if getattr(self.tokenizer, "_chat_template", None) is not None or not self._says_where:
            return None
        if not _GENERATION.search(self._inner.get_chat_template(None, tools)):
            return None
        thinking = getattr(
            self.tokenizer, "_thinking_kwarg", "enable_thinking"
        )  # as the wrapper sets it
        made = self._inner.apply_chat_template(
            messages,
            tools=tools,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **{thinking: getattr(self.tokenizer, "has_thinking", False)},
        )
        tokens = list(made["input_ids"])
        mask = list(made["assistant_masks"])
        if tokens != self._tokens(text):
            return None
        ends = set(self.tokenizer.eos_token_ids)
        for i in range(
            1, len(mask)
        ):  # marks that leave out the end of the turn would teach the model never to stop
            if mask[i - 1] and not mask[i] and tokens[i] in ends and tokens[i - 1] not in ends:
                mask[i] = 1
        return tokens, mask

    # --- found by comparing renders ---------------------------------------------------------------

    def _span(self, messages: Messages, tools: Any, i: int, text: str) -> tuple[int, int]:
        """Characters that the assistant says in turn ``i``, with the mark that ends it."""
        start = self._start(messages, tools, i, text)
        end = self._end(messages, tools, i, text)
        if start is None or end is None or not start < end:
            raise MaskError(
                f"'messages'[{i}]: the chat template does not show for certain where the assistant speaks; {_ADVICE}"
            )
        return start, end

    def _start(self, messages: Messages, tools: Any, i: int, text: str) -> int | None:
        if i:
            prompt = self._render(messages[:i], tools, prompt=True)
            if text.startswith(prompt):
                return len(prompt)
        said = self._render(
            [*messages[:i], {"role": "assistant", "content": _SAID}, *messages[i + 1 :]], tools
        )
        if said.count(_SAID) != 1:
            return None
        before = said.partition(_SAID)[0]
        asked = self._render(messages[:i], tools) if i else None
        if asked is not None and said.startswith(asked):
            # the prompt may open what the whole render leaves out, such as a thought: the turn
            # starts where they part
            start = len(commonprefix([prompt, said]))
            return (
                start
                if len(asked) <= start <= len(before) and text.startswith(said[:start])
                else None
            )
        # what came before is rendered differently now: find the opening of the turn in the
        # template's text before it
        opening = (
            prompt[len(asked) :]
            if asked is not None and prompt.startswith(asked)
            else self._opened(tools)
        )
        found = before.rfind(opening)
        if (
            not opening
            or found < 0
            or len(before) - found > self._literal(messages, tools, i, before)
        ):
            return None
        start = found + len(opening)
        return start if text.startswith(before[:start]) else None

    def _opened(self, tools: Any) -> str:
        """What the template writes to let the assistant speak."""
        if self._opening is None:
            asked = [{"role": "user", "content": _ASKED}]
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
            {**messages[i - 1], "content": _ASKED},
            {"role": "assistant", "content": _SAID},
        ]
        changed = self._render([*other, *messages[i + 1 :]], tools).partition(_SAID)[0]
        return len(commonprefix([before[::-1], changed[::-1]])) if _ASKED in changed else 0

    def _end(self, messages: Messages, tools: Any, i: int, text: str) -> int | None:
        whole = self._render(messages[: i + 1], tools) if i + 1 < len(messages) else text
        end = len(whole) if text.startswith(whole) else self._end_by_tail(messages, tools, i, text)
        if end is None:
            return None
        shorter = text[:end].rstrip()
        if shorter.endswith(self._special):  # a line break after the mark is the template's
            return len(shorter)
        return end + self._leading(text[end:], tuple(self._ends))

    def _end_by_tail(self, messages: Messages, tools: Any, i: int, text: str) -> int | None:
        """The end of a turn that is rendered differently when it is the last, by what follows it."""
        turn = {"role": "assistant", "content": _SAID}
        rest = self._render([*messages[:i], turn, *messages[i + 1 :]], tools).partition(_SAID)[2]
        last = self._render([*messages[:i], turn], tools).partition(_SAID)[2]
        if not rest or not text.endswith(rest):
            return None
        said = len(text) - len(rest)
        if last and rest.startswith(last):
            return said + len(last)
        mark = self._leading(rest, self._special)
        return said + mark if mark else None

    @staticmethod
    def _leading(text: str, marks: tuple[str, ...]) -> int:
        """Length of a mark that a text begins with, white space before it included.

        0 if there is none.
        """
        blank = len(text) - len(text.lstrip())
        found = [len(mark) for mark in marks if text.startswith(mark, blank)]
        return blank + max(found) if found else 0

    # --- characters to tokens ---------------------------------------------------------------------

    def _offers_offsets(self) -> bool:
        """Whether the tokenizer tells where in the text each token stands, in the tokens that it
        itself makes.
        """
        if not getattr(self._inner, "is_fast", False):
            return False
        probe = "a b\n\nc"
        made = self._inner(probe, add_special_tokens=False, return_offsets_mapping=True)
        return list(made["input_ids"]) == self._tokens(probe)

    def _located(self, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
        """Tokens, and which of them overlap a span of characters."""
        if self._says_where:
            made = self._inner(text, add_special_tokens=False, return_offsets_mapping=True)
            tokens = list(made["input_ids"])
            places = made["offset_mapping"]
        else:
            tokens = self._tokens(text)
            places = []
        mask = [0] * len(tokens)
        for start, end in spans:
            if places:
                # a token of white space may have no width, so it counts by what stands around it
                first = next((k for k, place in enumerate(places) if place[1] > start), len(tokens))
                stop = (
                    next((k for k in range(len(tokens) - 1, -1, -1) if places[k][0] < end), -1) + 1
                )
            else:
                first, stop = (self._cut(text, at, tokens) for at in (start, end))
            mask[first:stop] = [1] * (stop - first)
        return tokens, mask

    def _cut(self, text: str, at: int, tokens: list[int]) -> int:
        """Tokens before a character, for tokenizers that do not say.

        Those that the text up to there has in common.
        """
        return len(commonprefix([self._tokens(text[:at]), tokens]))
