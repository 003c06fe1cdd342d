"""Anything with rows → tokens and masks, every row checked before the first step.

``Trainer`` calls ``read``. A row is ``text``, ``prompt`` and ``completion``, or ``messages`` (with
``tools``). All faults are collected into one error, so that a user mends them in one go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from os.path import commonprefix
from typing import Any, NamedTuple

import numpy as np

from qlab.core.config.train import TrainConfig
from qlab.core.train.rows import Row, Rows, outside_vocabulary
from qlab.engine.data.chat_masks import ChatEncoder, MaskError
from qlab.engine.data.conversation import Fault, Message, messages, tools, type_name
from qlab.engine.data.sources import Text, numbered, rows_of
from qlab.errors import DataError, nearest

_KEYS = ("text", "prompt", "completion", "messages", "tools")
_SHOWN_FAULTS = 20  # listed in one error
_SHOWN_ROWS = 5  # numbers listed for one fault
_SHOWN_CUT = 24  # tokens kept, to be shown, of those cut off
# keys of other programs' data, for hints
_INPUTS = ("instruction", "question", "query", "input")
_OUTPUTS = ("output", "answer", "response")


class Encoded(NamedTuple):
    """A row as tokens.

    Attributes:
        kind: ``text``, ``completion`` or ``chat``.
        tokens: token ids.
        mask: 1 for each token that is a target, else 0.
    """

    kind: str
    tokens: list[int]
    mask: list[int]


def read(data: Any, tokenizer: Any, config: TrainConfig, vocabulary: int | None = None) -> Rows:
    """Return the rows of any data.

    Rows of several kinds may be mixed, since each carries its own mask; a key that holds None
    counts as absent. A text or completion ends with the tokenizer's end token. Running text is cut
    into rows of ``max_seq_length`` in which every token but the first is a target once. ``prompt``
    and ``completion`` are a turn each where the tokenizer has a chat template, as in mlx-lm, and
    are joined as they are where it has none; both may be lists of messages.

    Args:
        data: a list of strings or dicts, a ``datasets`` set, a data frame, a dict of columns, a
            path of ``.jsonl``, ``.json``, ``.csv``, ``.parquet`` or ``.txt``, any iterable of
            these, or running text. ``Rows`` stay as they are.
        tokenizer: mlx-lm's wrapper.
        config: longest row, and whether prompts are masked.
        vocabulary: tokens that the model knows; MLX would read foreign memory for others. None is
            not checked.

    Raises:
        DataError: names every row that cannot be used, its key and what is wrong.

    Example:
        >>> rows = read(["One.", {"prompt": "1+1?", "completion": "2"}], tokenizer, TrainConfig())
        >>> rows.kind, len(rows)
        ('mixed', 2)
    """
    if isinstance(data, Rows):
        faults = [(row.number, outside_vocabulary(row.tokens, vocabulary)) for row in data]
        _refuse([(number, fault) for number, fault in faults if fault], len(data))
        return data
    source = rows_of(data)
    if isinstance(source, Text):
        return _running_text(source, tokenizer, config.max_seq_length, vocabulary)
    encoder = _RowEncoder(tokenizer, config.mask_prompt)
    return _encoded_rows(source, encoder, config.max_seq_length, vocabulary)


def _encoded_rows(
    source: Iterable[Any], encoder: _RowEncoder, longest: int, vocabulary: int | None
) -> Rows:
    rows: list[Row] = []
    dropped: list[tuple[int, str]] = []
    faults: list[tuple[int, str]] = []
    kinds: set[str] = set()
    count = 0
    for number, value in numbered(source):
        count += 1
        try:
            kind, tokens, mask = encoder.encode(value)
        except (Fault, MaskError) as fault:
            faults.append((number, str(fault)))
            continue
        row = _row(number, tokens, mask, longest)
        fault = outside_vocabulary(row.tokens, vocabulary)
        if fault:
            faults.append((number, fault))
        elif row.mask.any():
            rows.append(row)
            kinds.add(kind)
        else:
            dropped.append((number, _why_no_target(row, longest)))
    _refuse(faults, count)
    if not rows:
        why = "it holds no rows"
        if count:
            number, reason = dropped[0]
            why = f"none of {count} rows has a target: {reason} (row {number})"
        raise DataError(f"The data gives nothing to train on: {why}.")
    kind = kinds.pop() if len(kinds) == 1 else "mixed"
    return Rows(tuple(rows), kind, tuple(dropped))


def _why_no_target(row: Row, longest: int) -> str:
    if not row.cut:
        return "it is empty"
    return f"its first {longest} tokens hold no target: max_seq_length cuts them off"


def _refuse(faults: list[tuple[int, str]], count: int) -> None:
    """Say what is wrong with which rows; what is wrong with many is said once."""
    if not faults:
        return
    numbers_of: dict[str, list[int]] = {}
    for number, fault in faults:
        numbers_of.setdefault(fault, []).append(number)
    lines = [f"- {_rows(numbers)}: {fault}" for fault, numbers in numbers_of.items()]
    message = [f"{len(faults)} of {count} rows cannot be used:", *lines[:_SHOWN_FAULTS]]
    if len(lines) > _SHOWN_FAULTS:
        message.append(f"… and {len(lines) - _SHOWN_FAULTS} more.")
    raise DataError("\n".join(message))


def _rows(numbers: list[int]) -> str:
    """Name rows: ``row 3``, ``rows 3, 4``, ``rows 0, 1, 2, 3, 4 and 7 more``."""
    if len(numbers) == 1:
        return f"row {numbers[0]}"
    listed = ", ".join(map(str, numbers[:_SHOWN_ROWS]))
    more = len(numbers) - _SHOWN_ROWS
    return f"rows {listed} and {more} more" if more > 0 else f"rows {listed}"


def _row(number: int, tokens: list[int], mask: list[int], longest: int) -> Row:
    """Return a row, cut to the longest that is allowed."""
    targets = np.array(mask[:longest], np.uint8)
    targets[:1] = 0  # nothing comes before the first token, so nothing predicts it
    beyond = None
    if len(tokens) > longest:
        beyond = np.array(tokens[longest : longest + _SHOWN_CUT], np.int32)
    return Row(
        number=number,
        tokens=np.array(tokens[:longest], np.int32),
        mask=targets,
        cut=max(len(tokens) - longest, 0),
        beyond=beyond,
    )


def _running_text(text: str, tokenizer: Any, longest: int, vocabulary: int | None) -> Rows:
    """Cut text into rows in which every token but the text's first is a target once."""
    try:
        tokens = _ended(tokenizer, list(tokenizer.encode(str(text))))
    except Exception as error:  # as for a row
        raise DataError(f"The text cannot be tokenized: {error}.") from None
    fault = outside_vocabulary(tokens, vocabulary)
    if fault:
        raise DataError(f"The text cannot be used: {fault}.")
    first = tokenizer.bos_token_id
    begins = first is not None and tokens[:1] == [first]
    rows = []
    for number, at in enumerate(range(1, len(tokens), longest - 1)):
        # each row begins with the token that begins every text, or with the one before
        head = first if begins else tokens[at - 1]
        part = [head, *tokens[at : at + longest - 1]]
        rows.append(_row(number, part, [1] * len(part), longest))
    if not rows:
        raise DataError("The text has fewer than two tokens; give at least a few sentences.")
    return Rows(tuple(rows), "text")


def _ended(tokenizer: Any, tokens: list[int]) -> list[int]:
    """Tokens that begin and end once: a text may hold the marks that the tokenizer sets."""
    first = tokenizer.bos_token_id
    end = tokenizer.eos_token_id
    if first is not None and first != end and tokens[:2] == [first, first]:
        tokens = tokens[1:]
    is_ended = bool(tokens) and tokens[-1] in tokenizer.eos_token_ids
    return tokens if end is None or is_ended else [*tokens, end]


class _RowEncoder:
    """Makes tokens and mask of a row.

    Args:
        tokenizer: mlx-lm's wrapper.
        mask_prompt: whether only what the assistant says (or the completion) is a target.
    """

    def __init__(self, tokenizer: Any, mask_prompt: bool) -> None:
        self.tokenizer = tokenizer
        self.mask_prompt = mask_prompt
        has_template = getattr(tokenizer, "has_chat_template", False)
        self.chats = ChatEncoder(tokenizer) if has_template else None

    def encode(self, row: Any) -> Encoded:
        """Return a row as tokens.

        Raises:
            Fault: it is no row that can be trained on.
            MaskError: its template does not show where the assistant speaks.
        """
        if isinstance(row, Fault):  # of the line that it should stand in
            raise row
        if isinstance(row, str):
            row = {"text": row}
        if not isinstance(row, Mapping):
            raise Fault(f"it is {type_name(row)}, not a dict or a string")
        values = {key: row[key] for key in _KEYS if _is_given(row.get(key))}
        form, encode = self._form(row, values)
        try:
            return encode(values)
        except (UnicodeError, TypeError) as error:  # such as half of a surrogate pair
            raise Fault(f"{form!r} cannot be tokenized: {error}") from None

    def _form(
        self, row: Mapping[Any, Any], values: dict[str, Any]
    ) -> tuple[str, Callable[[dict[str, Any]], Encoded]]:
        """Return the key in which a row is given, and what encodes it."""
        forms: dict[str, Callable[[dict[str, Any]], Encoded]] = {}
        if "text" in values:
            forms["text"] = self._text
        if "prompt" in values and "completion" in values:
            forms["prompt"] = self._prompt
        if "messages" in values:
            forms["messages"] = self._messages
        if not forms:
            raise Fault(_unknown(row, values))
        if len(forms) > 1:
            names = " and ".join(map(repr, forms))
            raise Fault(f"it has {names}; a row is given in one way, so remove the others")
        if "tools" in values and "text" in forms:
            raise Fault("'tools' needs 'messages' beside it")
        return forms.popitem()

    def _text(self, values: dict[str, Any]) -> Encoded:
        text = _string(values, "text")
        tokens = []
        if text.strip():
            tokens = _ended(self.tokenizer, list(self.tokenizer.encode(text)))
        return Encoded("text", tokens, [1] * len(tokens))

    def _prompt(self, values: dict[str, Any]) -> Encoded:
        sides = (values["prompt"], values["completion"])
        if any(isinstance(side, (list, tuple)) for side in sides):
            asked = messages(values["prompt"], "prompt")
            answered = messages(values["completion"], "completion")
            turns = [*asked, *answered]
            return self._chat(turns, values, "completion", first=len(asked))
        prompt = _string(values, "prompt")
        completion = _string(values, "completion")
        if not completion.strip():
            raise Fault("'completion' is empty")
        if self.chats is not None:
            turns = [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": completion},
            ]
            return self._chat(turns, values, "completion")
        if "tools" in values:
            raise Fault("'tools' needs a chat template, and this tokenizer has none")
        return self._joined(prompt, completion)

    def _joined(self, prompt: str, completion: str) -> Encoded:
        """Join prompt and completion as they are, for a tokenizer without a chat template."""
        head = list(self.tokenizer.encode(prompt))
        ends = head[-1:] == [self.tokenizer.eos_token_id]
        if ends and head[-1] not in self._plain(prompt)[-1:]:
            head.pop()  # a tokenizer that ends every text by itself
        tokens = list(self.tokenizer.encode(prompt + completion))
        if commonprefix([head, tokens]) != head:
            # a token would reach over the border, where none can when the model is asked
            tokens = [*head, *self._plain(completion)]
        tokens = _ended(self.tokenizer, tokens)
        prompt_mask = [int(not self.mask_prompt)] * len(head)
        completion_mask = [1] * (len(tokens) - len(head))
        return Encoded("completion", tokens, prompt_mask + completion_mask)

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _messages(self, values: dict[str, Any]) -> Encoded:
        return self._chat(messages(values["messages"], "messages"), values, "messages")

    def _chat(
        self, turns: list[Message], values: dict[str, Any], key: str, first: int = 0
    ) -> Encoded:
        """Encode a conversation.

        Args:
            turns: its messages.
            values: the row, for its tools.
            key: in which it was given.
            first: number of the first message that may be a target.
        """
        known_tools = tools(values.get("tools"))
        if self.chats is None:
            other = "give 'prompt' and 'completion' as strings, or 'text'"
            raise Fault(f"{key!r} needs a chat template, and this tokenizer has none; {other}")
        targets = [
            i
            for i, turn in enumerate(turns)
            if i >= first and turn["role"] == "assistant" and turn.get("weight", 1)
        ]
        if self.mask_prompt and not targets:
            hint = "with mask_prompt=False every token is learned"
            raise Fault(f"{key!r} has no message of the assistant to learn; {hint}")
        plain = [{key: value for key, value in turn.items() if key != "weight"} for turn in turns]
        tokens, mask = self.chats.encode(plain, known_tools, targets if self.mask_prompt else None)
        kind = "chat" if key == "messages" else "completion"
        return Encoded(kind, tokens, mask)


def _is_given(value: Any) -> bool:
    """Whether a key holds something: data frames hold NaN, which is not equal to itself."""
    return value is not None and value == value


def _string(values: dict[str, Any], key: str) -> str:
    if not isinstance(values[key], str):
        raise Fault(f"{key!r} is {type_name(values[key])}, not a string")
    return values[key]


def _unknown(row: Mapping[Any, Any], values: dict[str, Any]) -> str:
    """Say what a row lacks."""
    for one, other in (("prompt", "completion"), ("completion", "prompt")):
        if one in values:
            return f"{other!r} is missing beside {one!r}.{_misspelt(row, one, other)}"
    empty = [key for key in _KEYS if key != "tools" and key in row]
    if empty:
        verb = "holds" if len(empty) == 1 else "hold"
        return f"{' and '.join(map(repr, empty))} {verb} nothing"
    if "conversations" in row:
        form = "a list of dicts with 'role' and 'content'"
        return f"it has 'conversations'; call it 'messages', {form}"
    asked = next((key for key in _INPUTS if key in row), None)
    answered = next((key for key in _OUTPUTS if key in row), None)
    if asked and answered:
        return f"it has {asked!r} and {answered!r}; call them 'prompt' and 'completion'"
    has = f"it has {', '.join(map(repr, row))}" if row else "it has no keys"
    hints = (nearest(str(key), [k for k in _KEYS if k != "tools"]) for key in row)
    hint = next(filter(None, hints), "")
    return f"{has}; it needs 'text', 'prompt' and 'completion', or 'messages'.{hint}"


def _misspelt(row: Mapping[Any, Any], one: str, other: str) -> str:
    """Name a key that may have been meant as ``other``."""
    for key in row:
        if key != one and nearest(str(key), [other]):
            return f" Did you mean {other!r} by {key!r}?"
    return ""
