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
from typing import Any, NamedTuple

_STAND_IN = "@@qlab says this@@"  # for what the assistant says
_QUESTION = "@@qlab asks this@@"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ADVICE = "set mask_prompt=False to train on every token, or give 'prompt' and 'completion'"

Message = dict[str, Any]
Messages = list[Message]
Numbers = list[int]
TokensAndMask = tuple[Numbers, Numbers]
Span = tuple[int, int]


class MaskError(Exception):
    """The template refuses a conversation, or does not show where the assistant speaks."""


class _Turn(NamedTuple):
    """A turn that is looked for in the render of its conversation.

    Attributes:
        messages: of the whole conversation.
        tools: for the template, or None.
        index: number of the turn's message.
        text: render of the whole conversation.
    """

    messages: Messages
    tools: Any
    index: int
    text: str

    @property
    def earlier(self) -> Messages:
        """The messages before the turn."""
        return self.messages[: self.index]

    @property
    def later(self) -> Messages:
        """The messages after the turn."""
        return self.messages[self.index + 1 :]

    @property
    def is_last(self) -> bool:
        """Whether no message comes after the turn."""
        return not self.later

    @property
    def until_here(self) -> Messages:
        """The messages up to the turn, and its own."""
        return self.messages[: self.index + 1]


class ChatEncoder:
    """Renders conversations to tokens and masks.

    Args:
        tokenizer: mlx-lm's wrapper, with a chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._inner = getattr(tokenizer, "_tokenizer", tokenizer)  # transformers' own
        ends = map(tokenizer.convert_ids_to_tokens, sorted(tokenizer.eos_token_ids))
        self._ends = tuple(filter(None, ends))  # what may end a turn
        special = set(self._ends)
        special.update(tokenizer.all_special_tokens)
        self._special = tuple(special)
        self._has_offsets = self._offers_offsets()
        self._opening: str | None = None

    def encode(self, messages: Messages, tools: Any, turns: Numbers | None) -> TokensAndMask:
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
        if turns == _turns_of_assistant(messages):  # the template's marks know no single turns
            marked = self._marked(messages, tools, text)
            if marked is not None:
                return marked
        spans = []
        for index in turns:
            turn = _Turn(messages, tools, index, text)
            spans.append(self._span(turn))
        return self._located(text, spans)

    def _render(self, messages: Messages, tools: Any, prompt: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # templates raise what they like
            raise MaskError(f"'messages': the chat template refuses them: {error}") from None

    def _tokens(self, text: str) -> Numbers:
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        return list(tokens)

    # --- the template's own marks -----------------------------------------------------------------

    def _marked(self, messages: Messages, tools: Any, text: str) -> TokensAndMask | None:
        """Tokens and mask by ``{% generation %}``; None where the template has no such marks."""
        if not self._has_marks(tools):
            return None
        thinking = getattr(self.tokenizer, "_thinking_kwarg", "enable_thinking")
        has_thinking = getattr(self.tokenizer, "has_thinking", False)
        rendered = self._inner.apply_chat_template(
            messages,
            tools=tools,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **{thinking: has_thinking},  # as the wrapper sets it
        )
        tokens = list(rendered["input_ids"])
        if tokens != self._tokens(text):
            return None
        mask = list(rendered["assistant_masks"])
        return tokens, self._with_ends(tokens, mask)

    def _has_marks(self, tools: Any) -> bool:
        """Whether the template that renders marks the assistant's turns."""
        if not self._has_offsets:
            return False
        # mlx-lm's wrapper may render with a template of its own, in which there are no marks
        wrapper_template = getattr(self.tokenizer, "_chat_template", None)
        if wrapper_template is not None:
            return False
        template = self._inner.get_chat_template(None, tools)
        return _GENERATION.search(template) is not None

    def _with_ends(self, tokens: Numbers, mask: Numbers) -> Numbers:
        """Make the end of every turn a target: without it a model learns never to stop."""
        ends = set(self.tokenizer.eos_token_ids)
        for i in range(1, len(mask)):
            previous = i - 1
            turn_is_over = mask[previous] and not mask[i]
            has_its_end = tokens[previous] in ends
            if turn_is_over and not has_its_end and tokens[i] in ends:
                mask[i] = 1
        return mask

    # --- found by comparing renders ---------------------------------------------------------------

    def _span(self, turn: _Turn) -> Span:
        """Characters that the assistant says in a turn, with the mark that ends it."""
        start = self._start(turn)
        end = self._end(turn)
        if start is None or end is None or not start < end:
            where = "does not show for certain where the assistant speaks"
            raise MaskError(f"'messages'[{turn.index}]: the chat template {where}; {_ADVICE}")
        return start, end

    def _start(self, turn: _Turn) -> int | None:
        """First character of a turn; None if nothing proves where it is.

        Three ways, in order: the prompt is a prefix of the whole render; or the render with a
        stand-in for the turn parts from the prompt where the turn begins; or the template's opening
        of a turn stands right before the stand-in.
        """
        prompt = ""
        if turn.earlier:
            prompt = self._render(turn.earlier, turn.tools, prompt=True)
            if turn.text.startswith(prompt):
                return len(prompt)
        stand_in = self._with_stand_in(turn)
        if stand_in.count(_STAND_IN) != 1:
            return None
        before = stand_in.partition(_STAND_IN)[0]
        if not turn.earlier:
            opening = self._opened(turn.tools)
            return self._start_by_opening(turn, opening, before)
        asked = self._render(turn.earlier, turn.tools)  # without the opening of the turn
        if stand_in.startswith(asked):
            # the prompt may open what the whole render leaves out, such as a thought: the turn
            # starts where they part
            start = len(commonprefix([prompt, stand_in]))
            is_in_opening = len(asked) <= start <= len(before)
            common = stand_in[:start]
            return start if is_in_opening and turn.text.startswith(common) else None
        # what came before is rendered differently now
        if prompt.startswith(asked):
            opening = prompt[len(asked) :]
        else:
            opening = self._opened(turn.tools)
        return self._start_by_opening(turn, opening, before)

    def _with_stand_in(self, turn: _Turn) -> str:
        """Render with a text in the place of a turn that stands nowhere else."""
        messages = [*turn.earlier, _says(_STAND_IN), *turn.later]
        return self._render(messages, turn.tools)

    def _start_by_opening(self, turn: _Turn, opening: str, before: str) -> int | None:
        """Find the opening of a turn in the template's text before it."""
        at = before.rfind(opening)
        if not opening or at < 0:
            return None
        distance = len(before) - at
        if distance > self._literal(turn, before):
            return None  # it stands in what a user wrote
        start = at + len(opening)
        opened = before[:start]
        return start if turn.text.startswith(opened) else None

    def _opened(self, tools: Any) -> str:
        """What the template writes to let the assistant speak."""
        if self._opening is None:
            asked = [{"role": "user", "content": _QUESTION}]
            plain = self._render(asked, tools)
            prompt = self._render(asked, tools, prompt=True)
            self._opening = ""
            if prompt.startswith(plain):
                self._opening = prompt[len(plain) :]
        return self._opening

    def _literal(self, turn: _Turn, before: str) -> int:
        """How many of the characters before a turn are the template's.

        Those that stay when the message before it changes.
        """
        if not turn.earlier:
            return len(before)
        *earlier, previous = turn.earlier
        question = {**previous, "content": _QUESTION}
        other = [*earlier, question, _says(_STAND_IN), *turn.later]
        rendered = self._render(other, turn.tools)
        changed = rendered.partition(_STAND_IN)[0]
        if _QUESTION not in changed:
            return 0
        backwards = [before[::-1], changed[::-1]]
        return len(commonprefix(backwards))

    def _end(self, turn: _Turn) -> int | None:
        """Character after a turn and its mark; None if nothing proves where it is."""
        text = turn.text
        until_here = text
        if not turn.is_last:
            until_here = self._render(turn.until_here, turn.tools)
        end: int | None = len(until_here)
        if not text.startswith(until_here):
            end = self._end_by_tail(turn)
        if end is None:
            return None
        shorter = text[:end].rstrip()
        if shorter.endswith(self._special):  # a line break after the mark is the template's
            return len(shorter)
        return end + _leading_mark(text[end:], self._ends)

    def _end_by_tail(self, turn: _Turn) -> int | None:
        """The end of a turn, by what follows it: as the last it would be rendered differently."""
        rest = self._after_stand_in(turn)
        as_last = turn._replace(messages=turn.until_here)
        rest_of_last = self._after_stand_in(as_last)
        if not rest or not turn.text.endswith(rest):
            return None
        end = len(turn.text) - len(rest)
        if rest_of_last and rest.startswith(rest_of_last):
            return end + len(rest_of_last)
        mark = _leading_mark(rest, self._special)
        return end + mark if mark else None

    def _after_stand_in(self, turn: _Turn) -> str:
        """What is rendered after a text in the place of a turn."""
        stand_in = self._with_stand_in(turn)
        return stand_in.partition(_STAND_IN)[2]

    # --- characters to tokens ---------------------------------------------------------------------

    def _offers_offsets(self) -> bool:
        """Whether the tokenizer says at which character each token begins and ends.

        And whether it does so for the same tokens that ``encode`` gives.
        """
        if not getattr(self._inner, "is_fast", False):
            return False
        probe = "a b\n\nc"
        encoded = self._with_offsets(probe)
        return list(encoded["input_ids"]) == self._tokens(probe)

    def _with_offsets(self, text: str) -> Any:
        return self._inner(text, add_special_tokens=False, return_offsets_mapping=True)

    def _located(self, text: str, spans: list[Span]) -> TokensAndMask:
        """Tokens, and which of them overlap a span of characters."""
        if self._has_offsets:
            encoded = self._with_offsets(text)
            tokens = list(encoded["input_ids"])
            offsets = encoded["offset_mapping"]
            ranges = [_overlapping(offsets, span) for span in spans]
        else:
            tokens = self._tokens(text)
            ranges = [self._between_cuts(text, span, tokens) for span in spans]
        return tokens, _mask(len(tokens), ranges)

    def _between_cuts(self, text: str, span: Span, tokens: Numbers) -> Span:
        """First token of a span of characters and the one after the last.

        For tokenizers that do not say where tokens begin.
        """
        start, end = span
        first = self._cut(text, start, tokens)
        stop = self._cut(text, end, tokens)
        return first, stop

    def _cut(self, text: str, at: int, tokens: Numbers) -> int:
        """Tokens before a character: those that the text up to there has in common."""
        tokens_before = self._tokens(text[:at])
        return len(commonprefix([tokens_before, tokens]))


def _says(content: str) -> Message:
    """Return a message of the assistant."""
    return {"role": "assistant", "content": content}


def _turns_of_assistant(messages: Messages) -> Numbers:
    """Return the numbers of all messages of the assistant."""
    roles = [message["role"] for message in messages]
    return [i for i, role in enumerate(roles) if role == "assistant"]


def _leading_mark(text: str, marks: tuple[str, ...]) -> int:
    """Length of a mark that a text begins with, white space before it included.

    0 if there is none.
    """
    blank = len(text) - len(text.lstrip())
    leading = [mark for mark in marks if text.startswith(mark, blank)]
    if not leading:
        return 0
    longest = max(leading, key=len)
    return blank + len(longest)


def _overlapping(offsets: list[Span], span: Span) -> Span:
    """First token that reaches into a span of characters, and the one after the last.

    A token of white space may have no width, so it counts by what stands around it.
    """
    start, end = span
    count = len(offsets)
    ends_after = (k for k in range(count) if offsets[k][1] > start)
    begins_before = (k for k in reversed(range(count)) if offsets[k][0] < end)
    first = next(ends_after, count)
    last = next(begins_before, -1)
    return first, last + 1


def _mask(size: int, ranges: list[Span]) -> Numbers:
    """1 within ranges, else 0."""
    mask = [0] * size
    for first, stop in ranges:
        count = stop - first
        mask[first:stop] = [1] * count
    return mask
