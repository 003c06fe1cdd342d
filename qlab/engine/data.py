"""Anything with rows → tokens and masks, every row checked before the first step. Knows no model and no batches.

A row is ``text``, ``prompt`` and ``completion``, or ``messages`` (with ``tools``). All faults are collected into one error.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qlab.core.rows import Row, Rows
from qlab.core.training import TrainConfig
from qlab.engine.masks import MaskError, chat
from qlab.errors import DataError, nearest

_SHOWN = 20
_KEYS = ("text", "prompt", "completion", "messages", "tools")
_ROLES = ("system", "user", "assistant", "tool", "developer")


class _Fault(Exception):
    """What is wrong with a row."""


def read(data: Any, tokenizer: Any, config: TrainConfig) -> Rows:
    """Return the rows of any data.

    Args:
        data: a list of strings or dicts, a ``datasets`` set, a path of ``.jsonl``, ``.json``, ``.csv`` or ``.txt`` (a text
            row per paragraph), or any iterable of these.
        tokenizer: mlx-lm's wrapper.
        config: longest row, and whether prompts are masked.

    Raises:
        DataError: names every row that cannot be used, its key and what is wrong.
    """
    rows, dropped, faults, kinds = [], [], [], set()
    count = 0
    for number, found in enumerate(_source(data)):
        count += 1
        try:
            kind, tokens, mask = _tokenized(found, tokenizer, config.mask_prompt)
        except (_Fault, MaskError) as fault:
            faults.append(f"row {number}: {fault}")
            continue
        kinds.add(kind)
        cut = max(len(tokens) - config.max_seq_length, 0)
        tokens, mask = (np.array(x[: config.max_seq_length], kind) for x, kind in ((tokens, np.int32), (mask, np.uint8)))
        mask[:1] = 0
        if not mask.any():
            why = f"its first {config.max_seq_length} tokens hold no target" if cut else "it holds no target"
            dropped.append((number, why))
            continue
        rows.append(Row(number, tokens, mask, cut))
    if faults:
        more = f"\n… and {len(faults) - _SHOWN} more." if len(faults) > _SHOWN else ""
        listed = "\n".join(f"- {fault}" for fault in faults[:_SHOWN])
        raise DataError(f"{len(faults)} of {count} rows cannot be used:\n{listed}{more}")
    if not rows:
        why = f"{count} rows were read, and none has a target: {dropped[0][1]} (row {dropped[0][0]})" if count else "no rows"
        raise DataError(f"There is nothing to train on: {why}.")
    return Rows(tuple(rows), kinds.pop() if len(kinds) == 1 else "mixed", tuple(dropped))


# --- where rows come from -------------------------------------------------------------------------------------------


def _source(data: Any) -> Iterable[Any]:
    if isinstance(data, (Path, str)):
        return _file(Path(data).expanduser())
    if isinstance(data, Mapping):
        if "train" in data and not isinstance(data["train"], str):
            raise DataError(f"The data is a set of splits ({', '.join(map(str, data))}); give one, such as data['train'].")
        raise DataError("The data is one dict; give a list of dicts, one for each row.")
    if not isinstance(data, Iterable) or isinstance(data, (bytes, bytearray)):
        raise DataError(f"The data is a {type(data).__name__}; give a list of dicts or strings, a datasets set, or a path.")
    return data


def _file(path: Path) -> Iterator[Any]:
    if not path.is_file():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"There is no file {str(path)!r}.{nearest(path.name, beside)}")
    kind = path.suffix.lower()
    if kind not in (".jsonl", ".json", ".csv", ".txt"):
        raise DataError(f"{path.name} is not read here; give a .jsonl, .json, .csv or .txt file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name} is not UTF-8 text: {error}.") from None
    if kind == ".txt":
        return iter([part.strip() for part in text.split("\n\n") if part.strip()])
    if kind == ".csv":
        return iter(list(csv.DictReader(text.splitlines())))
    if kind == ".json":
        try:
            found = json.loads(text)
        except ValueError as error:
            raise DataError(f"{path.name} is not JSON: {error}.") from None
        if not isinstance(found, list):
            raise DataError(f"{path.name} holds a {type(found).__name__}; it must hold a list of rows.")
        return iter(found)
    rows, faults = [], []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                faults.append(f"- line {number}: {error}")
    if faults:
        raise DataError(f"{len(faults)} lines of {path.name} are not JSON:\n" + "\n".join(faults[:_SHOWN]))
    return iter(rows)


# --- a row ----------------------------------------------------------------------------------------------------------


def _tokenized(row: Any, tokenizer: Any, mask_prompt: bool) -> tuple[str, list[int], list[int]]:
    """Return kind, tokens and mask of a row."""
    if isinstance(row, str):
        row = {"text": row}
    if not isinstance(row, Mapping):
        raise _Fault(f"it is a {type(row).__name__}, not a dict or a string")
    found = {key: row[key] for key in _KEYS if row.get(key) is not None}
    ways = [key for key in ("text", "prompt", "completion", "messages") if key in found]
    if ways == ["messages"]:
        messages = _messages(found["messages"])
        if tokenizer.chat_template is None:
            raise _Fault("'messages' needs a chat template, and this tokenizer has none; give 'prompt' and 'completion'")
        return "chat", *chat(tokenizer, messages, found.get("tools"), mask_prompt)
    if ways == ["text"]:
        tokens = _encoded(tokenizer, _string(found, "text"))
        return "text", tokens, [1] * len(tokens)
    if ways == ["prompt", "completion"]:
        prompt, completion = _string(found, "prompt"), _string(found, "completion")
        if tokenizer.chat_template is not None:
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            return "completion", *chat(tokenizer, messages, found.get("tools"), mask_prompt)
        head = list(tokenizer.encode(prompt))
        tail = [*tokenizer.encode(completion, add_special_tokens=False)]
        tokens = [*head, *tail, *_end(tokenizer, tail)]
        return "completion", tokens, [0 if mask_prompt else 1] * len(head) + [1] * (len(tokens) - len(head))
    if not ways:
        held = ", ".join(map(repr, row)) or "nothing"
        hint = next((h for key in row if (h := nearest(str(key), _KEYS))), "")
        raise _Fault(f"it has {held}; it needs 'text', 'prompt' and 'completion', or 'messages'.{hint}")
    if ways in (["prompt"], ["completion"]):
        missing = "completion" if ways == ["prompt"] else "prompt"
        raise _Fault(f"{missing!r} is missing beside {ways[0]!r}")
    raise _Fault(f"it has {' and '.join(map(repr, ways))}; only one way of giving a row can be used")


def _string(row: dict[str, Any], key: str) -> str:
    if not isinstance(row[key], str):
        raise _Fault(f"{key!r} is a {type(row[key]).__name__}, not a string")
    if not row[key].strip():
        raise _Fault(f"{key!r} is empty")
    return row[key]


def _messages(found: Any) -> list[dict[str, Any]]:
    if not isinstance(found, (list, tuple)) or not found:
        raise _Fault(f"'messages' is {'empty' if found in ([], ()) else f'a {type(found).__name__}'}, not a list of messages")
    for n, message in enumerate(found):
        place = f"'messages'[{n}]"
        if not isinstance(message, Mapping):
            raise _Fault(f"{place} is a {type(message).__name__}, not a dict with 'role' and 'content'")
        role = message.get("role")
        if role not in _ROLES:
            raise _Fault(f"{place}['role'] is {role!r}; it is one of {', '.join(_ROLES)}.{nearest(str(role), _ROLES)}")
        content = message.get("content")
        if not isinstance(content, str) and not message.get("tool_calls"):
            what = "missing" if content is None else f"a {type(content).__name__}"
            raise _Fault(f"{place}['content'] is {what}, not a string")
        if role == "assistant" and not (content or "").strip() and not message.get("tool_calls"):
            raise _Fault(f"{place}['content'] of the assistant is empty")
    if not any(message["role"] == "assistant" for message in found):
        raise _Fault("'messages' has no message of the assistant, so there is nothing to learn")
    return [dict(message) for message in found]


def _encoded(tokenizer: Any, text: str) -> list[int]:
    tokens = list(tokenizer.encode(text))
    return [*tokens, *_end(tokenizer, tokens)]


def _end(tokenizer: Any, tokens: list[int]) -> list[int]:
    """The token that ends a text, unless it is there or the tokenizer has none."""
    end = tokenizer.eos_token_id
    return [] if end is None or (tokens and tokens[-1] == end) else [end]


def pieces(row: Row, tokenizer: Any) -> list[str]:
    """Return the text of each token, for the eye."""
    return [tokenizer.decode([token]) for token in row.tokens.tolist()]
