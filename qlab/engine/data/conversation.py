"""Checks conversations, and brings what people write to the one form that chat templates read.

Knows no tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qlab.errors import nearest

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")


class Fault(Exception):
    """What is wrong with a row: the key, and why."""


def messages(found: Any, key: str) -> list[dict[str, Any]]:
    """Return messages as templates read them; the user's own are not changed.

    Parts of text are joined, and arguments of tool calls are read if they are JSON text, as
    mlx-lm's server does.

    Args:
        found: what the row has under ``key``.
        key: for the errors.

    Raises:
        Fault: a message is not one.
    """
    if not isinstance(found, (list, tuple)):
        raise Fault(f"{key!r} is {a(found)}, not a list of messages")
    if not found:
        raise Fault(f"{key!r} is empty")
    return [_message(message, f"{key!r}[{n}]") for n, message in enumerate(found)]


def _message(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise Fault(f"{place} is {a(message)}, not a dict with 'role' and 'content'")
    if "role" not in message:
        hint = (
            " 'from' and 'value' are called 'role' and 'content' here." if "from" in message else ""
        )
        raise Fault(f"{place} has no 'role'.{hint}")
    role = message["role"]
    if role not in ROLES:
        said = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}.get(
            str(role)
        )
        hint = f" Did you mean {said!r}?" if said else nearest(str(role), ROLES)
        raise Fault(f"{place}['role'] is {role!r}; it is one of {', '.join(ROLES)}.{hint}")
    made = {key: value for key, value in message.items() if value is not None and key != "weight"}
    calls = made.get("tool_calls")
    if calls:
        if role != "assistant":
            raise Fault(
                f"{place}['tool_calls'] stands in a message of {role!r}; only the assistant calls tools"
            )
        made["tool_calls"] = _calls(calls, f"{place}['tool_calls']")
    made["content"] = _content(made.get("content"), place, bool(calls))
    weight = message.get("weight")
    if weight is not None and weight not in (0, 1):
        raise Fault(f"{place}['weight'] is {weight!r}; it is 1 for a turn to learn, or 0")
    if weight is not None:
        made["weight"] = int(weight)
    if (
        role == "assistant"
        and not made["content"].strip()
        and not calls
        and not made.get("reasoning_content")
    ):
        raise Fault(f"{place}['content'] of the assistant is empty")
    return made


def _content(content: Any, place: str, calls: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        if calls:
            return ""
        raise Fault(f"{place} has no 'content'")
    if not isinstance(content, (list, tuple)):
        raise Fault(f"{place}['content'] is {a(content)}, not a string")
    for n, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            what = f"of the type {kind!r}" if kind and kind != "text" else "not a dict with 'text'"
            raise Fault(f"{place}['content'][{n}] is {what}; only text can be trained on")
    return "".join(part["text"] for part in content)


def _calls(calls: Any, place: str) -> list[dict[str, Any]]:
    if not isinstance(calls, (list, tuple)):
        raise Fault(f"{place} is {a(calls)}, not a list")
    made = []
    for n, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise Fault(f"{place}[{n}] has no 'function' with a 'name'")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _parsed(arguments, f"{place}[{n}]['function']['arguments']")
        if not isinstance(arguments, Mapping):
            raise Fault(
                f"{place}[{n}]['function']['arguments'] is {a(arguments)}, not a dict or its JSON text"
            )
        whole = (
            {**call, "function": {**function, "arguments": arguments}}
            if "function" in call
            else {**call}
        )
        made.append(whole if "function" in call else {**whole, "arguments": arguments})
    return made


def tools(found: Any) -> Any:
    """Return tools as templates read them: a list of JSON schemas, or None.

    Raises:
        Fault: they are not that.
    """
    if isinstance(found, str):
        found = _parsed(found, "'tools'")
    if found is None or found == []:
        return None
    if not isinstance(found, (list, tuple)):
        raise Fault(f"'tools' is {a(found)}, not a list of JSON schemas")
    for n, tool in enumerate(found):
        if not callable(tool) and not (
            isinstance(tool, Mapping) and isinstance(tool.get("function", tool), Mapping)
        ):
            raise Fault(f"'tools'[{n}] is {a(tool)}, not a JSON schema of a function")
        if isinstance(tool, Mapping) and not isinstance(
            tool.get("function", tool).get("name"), str
        ):
            raise Fault(f"'tools'[{n}] has no 'name'")
    return list(found)


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise Fault(f"{place} is not JSON: {error}") from None


def a(value: Any) -> str:
    """Return what a value is, in words."""
    name = "nothing" if value is None else type(value).__name__
    return name if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
