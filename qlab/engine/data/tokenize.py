"""Anything with rows → tokens and masks, every row checked before the first step.

Knows no model and no batches.

A row is ``text``, ``prompt`` and ``completion``, or ``messages`` (with ``tools``). All faults are
collected into one error.
"""

from __future__ import annotations

from collections.abc import Mapping
from os.path import commonprefix
from typing import Any

import numpy as np

from qlab.core.config.train import TrainConfig
from qlab.core.train.rows import Row, Rows, foreign
from qlab.engine.data.chat_masks import Chats, MaskError
from qlab.engine.data.conversation import Fault, a, messages, tools
from qlab.engine.data.sources import Text, numbered, rows_of
from qlab.errors import DataError, nearest

_KEYS = ("text", "prompt", "completion", "messages", "tools")
_SHOWN = 20  # faults listed in one error
_BEYOND = 24  # tokens kept, for the eye, of those cut off
_INPUTS = ("instruction", "question", "query", "input")
_OUTPUTS = ("output", "answer", "response")

Made = tuple[str, list[int], list[int]]  # kind, tokens, mask


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
        vocabulary: tokens that the model knows; MLX would look up others in foreign memory. None is
            not checked.

    Raises:
        DataError: names every row that cannot be used, its key and what is wrong.
    """
    if isinstance(data, Rows):
        _refuse(
            [(row.number, fault) for row in data if (fault := foreign(row.tokens, vocabulary))],
            len(data),
        )
        return data
    source = rows_of(data)
    if isinstance(source, Text):
        found = _running(source, tokenizer, config.max_seq_length)
        if fault := next(filter(None, (foreign(row.tokens, vocabulary) for row in found)), ""):
            raise DataError(f"The text cannot be used: {fault}.")
        return found
    maker = _Maker(tokenizer, config.mask_prompt)
    rows = []
    dropped = []
    faults = []
    kinds = set()
    count = 0
    for number, found in numbered(source):
        count += 1
        try:
            kind, tokens, mask = maker.make(found)
        except (Fault, MaskError) as fault:
            faults.append((number, str(fault)))
            continue
        row = _row(number, tokens, mask, config.max_seq_length)
        if fault := foreign(row.tokens, vocabulary):
            faults.append((number, fault))
        elif row.mask.any():
            rows.append(row)
            kinds.add(kind)
        else:
            cut = f"its first {config.max_seq_length} tokens hold no target: max_seq_length cuts them off"
            dropped.append((number, cut if row.cut else "it is empty"))
    _refuse(faults, count)
    if not rows:
        why = (
            f"none of {count} rows has a target: {dropped[0][1]} (row {dropped[0][0]})"
            if count
            else "it holds no rows"
        )
        raise DataError(f"The data gives nothing to train on: {why}.")
    return Rows(tuple(rows), kinds.pop() if len(kinds) == 1 else "mixed", tuple(dropped))


def _refuse(faults: list[tuple[int, str]], count: int) -> None:
    """Say what is wrong with which rows; what is wrong with many is said once."""
    same: dict[str, list[int]] = {}
    for number, fault in faults:
        same.setdefault(fault, []).append(number)
    if faults:
        lines = [f"- {_rows(numbers)}: {fault}" for fault, numbers in same.items()]
        more = [f"… and {len(lines) - _SHOWN} more."] if len(lines) > _SHOWN else []
        raise DataError(
            "\n".join([f"{len(faults)} of {count} rows cannot be used:", *lines[:_SHOWN], *more])
        )


def _rows(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return f"row {numbers[0]}"
    first = ", ".join(map(str, numbers[:5]))
    more = len(numbers) - 5
    return f"rows {first} and {more} more" if more > 0 else f"rows {first}"


def _row(number: int, tokens: list[int], mask: list[int], longest: int) -> Row:
    kept = np.array(mask[:longest], np.uint8)
    kept[:1] = 0
    cut = max(len(tokens) - longest, 0)
    beyond = np.array(tokens[longest : longest + _BEYOND], np.int32) if cut else None
    return Row(number, np.array(tokens[:longest], np.int32), kept, cut, beyond)


def _running(text: str, tokenizer: Any, longest: int) -> Rows:
    try:
        tokens = _ended(tokenizer, list(tokenizer.encode(str(text))))
    except Exception as error:  # as for a row
        raise DataError(f"The text cannot be tokenized: {error}.") from None
    first = tokenizer.bos_token_id
    # each row begins with the token that begins every text, or with the one before
    head = tokens[:1] if first is not None and tokens[:1] == [first] else None
    rows = []
    for number, at in enumerate(range(1, len(tokens), longest - 1)):
        part = [*(head or tokens[at - 1 : at]), *tokens[at : at + longest - 1]]
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
    return (
        tokens
        if end is None or tokens[-1:] and tokens[-1] in tokenizer.eos_token_ids
        else [*tokens, end]
    )


class _Maker:
    """Makes tokens and mask of a row."""

    def __init__(self, tokenizer: Any, mask_prompt: bool) -> None:
        self.tokenizer = tokenizer
        self.mask_prompt = mask_prompt
        self.chats = Chats(tokenizer) if getattr(tokenizer, "has_chat_template", False) else None

    def make(self, row: Any) -> Made:
        if isinstance(row, str):
            row = {"text": row}
        if isinstance(row, Fault):  # of the line that it should stand in
            raise row
        if not isinstance(row, Mapping):
            raise Fault(f"it is {a(row)}, not a dict or a string")
        # data frames hold NaN where there is nothing
        found = {
            key: row[key] for key in _KEYS if row.get(key) is not None and row[key] == row[key]
        }
        pair = "prompt" in found and "completion" in found
        ways = [
            way
            for way, has in (
                ("text", "text" in found),
                ("prompt", pair),
                ("messages", "messages" in found),
            )
            if has
        ]
        if not ways:
            raise Fault(_unknown(row, found))
        if len(ways) > 1:
            raise Fault(
                f"it has {' and '.join(map(repr, ways))}; a row is given in one way, so remove the others"
            )
        if "tools" in found and ways == ["text"]:
            raise Fault("'tools' needs 'messages' beside it")
        try:
            return getattr(self, f"_{ways[0]}")(found)
        except (UnicodeError, TypeError) as error:  # such as half of a surrogate pair
            raise Fault(f"{ways[0]!r} cannot be tokenized: {error}") from None

    def _text(self, found: dict[str, Any]) -> Made:
        text = _string(found, "text")
        tokens = _ended(self.tokenizer, list(self.tokenizer.encode(text))) if text.strip() else []
        return "text", tokens, [1] * len(tokens)

    def _prompt(self, found: dict[str, Any]) -> Made:
        if isinstance(found["prompt"], (list, tuple)) or isinstance(
            found["completion"], (list, tuple)
        ):
            asked, said = (messages(found[key], key) for key in ("prompt", "completion"))
            return "completion", *self._chat(
                [*asked, *said], tools(found.get("tools")), len(asked), "completion"
            )
        prompt = _string(found, "prompt")
        completion = _string(found, "completion")
        if not completion.strip():
            raise Fault("'completion' is empty")
        if self.chats is not None:
            turns = [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": completion},
            ]
            return "completion", *self._chat(turns, tools(found.get("tools")), 0, "completion")
        if "tools" in found:
            raise Fault("'tools' needs a chat template, and this tokenizer has none")
        head = list(self.tokenizer.encode(prompt))
        if head[-1:] == [self.tokenizer.eos_token_id] and head[-1] not in self._plain(prompt)[-1:]:
            head.pop()  # a tokenizer that ends every text by itself
        tokens = list(self.tokenizer.encode(prompt + completion))
        if (
            commonprefix([head, tokens]) != head
        ):  # a token would reach over the border, where none can when the model is asked
            tokens = [*head, *self._plain(completion)]
        tokens = _ended(self.tokenizer, tokens)
        return (
            "completion",
            tokens,
            [int(not self.mask_prompt)] * len(head) + [1] * (len(tokens) - len(head)),
        )

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _messages(self, found: dict[str, Any]) -> Made:
        return "chat", *self._chat(
            messages(found["messages"], "messages"), tools(found.get("tools")), 0, "messages"
        )

    def _chat(
        self, turns: list[dict[str, Any]], known: Any, first: int, key: str
    ) -> tuple[list[int], list[int]]:
        if self.chats is None:
            other = "give 'prompt' and 'completion' as strings, or 'text'"
            raise Fault(f"{key!r} needs a chat template, and this tokenizer has none; {other}")
        assistant = [
            i for i, turn in enumerate(turns) if i >= first and turn["role"] == "assistant"
        ]
        spoken = [i for i in assistant if turns[i].get("weight", 1)]
        if self.mask_prompt and not spoken:
            raise Fault(
                f"{key!r} has no message of the assistant to learn; with mask_prompt=False every token is learned"
            )
        plain = [{key: value for key, value in turn.items() if key != "weight"} for turn in turns]
        return self.chats.encode(plain, known, spoken if self.mask_prompt else None)


def _string(found: dict[str, Any], key: str) -> str:
    if not isinstance(found[key], str):
        raise Fault(f"{key!r} is {a(found[key])}, not a string")
    return found[key]


def _unknown(row: Mapping[Any, Any], found: dict[str, Any]) -> str:
    """Say what a row lacks."""
    for one, other in (("prompt", "completion"), ("completion", "prompt")):
        if one in found:
            near = next(
                (
                    f" Did you mean {other!r} by {key!r}?"
                    for key in row
                    if key != one and nearest(str(key), [other])
                ),
                "",
            )
            return f"{other!r} is missing beside {one!r}.{near}"
    empty = [key for key in _KEYS[:4] if key in row]
    if empty:
        return f"{' and '.join(map(repr, empty))} hold{'s' if len(empty) == 1 else ''} nothing"
    if "conversations" in row:
        return (
            "it has 'conversations'; call it 'messages', a list of dicts with 'role' and 'content'"
        )
    asked, said = (next((key for key in keys if key in row), None) for keys in (_INPUTS, _OUTPUTS))
    if asked and said:
        return f"it has {asked!r} and {said!r}; call them 'prompt' and 'completion'"
    has = f"it has {', '.join(map(repr, row))}" if row else "it has no keys"
    near = next((hint for key in row if (hint := nearest(str(key), _KEYS[:4]))), "")
    return f"{has}; it needs 'text', 'prompt' and 'completion', or 'messages'.{near}"
