"""Checks conversations, and brings what people write to the one form that chat templates read.

``tokenize`` calls it for every row with messages, before the tokenizer sees any of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qlab.errors import nearest

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
# other programs' words for the same roles
_ROLE_ELSEWHERE = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}

Message = dict[str, Any]


class Fault(Exception):
    """What is wrong with a row: the key, and why."""


def messages(value: Any, key: str) -> list[Message]:
    """Return messages as templates read them; the user's own are not changed.

    Parts of text are joined, and arguments of tool calls are read if they are JSON text, as
    mlx-lm's server does.

    Args:
        value: what the row has under ``key``.
        key: for the errors.

    Raises:
        Fault: a message is not one.
    """
    if not isinstance(value, (list, tuple)):
        raise Fault(f"{key!r} is {type_name(value)}, not a list of messages")
    if not value:
        raise Fault(f"{key!r} is empty")
    return [_message(message, f"{key!r}[{n}]") for n, message in enumerate(value)]


def _message(message: Any, place: str) -> Message:
    if not isinstance(message, Mapping):
        kind = type_name(message)
        raise Fault(f"{place} is {kind}, not a dict with 'role' and 'content'")
    role = _role(message, place)
    checked = {key: value for key, value in message.items() if value is not None}
    weight = checked.pop("weight", None)
    calls = checked.get("tool_calls")
    if calls:
        if role != "assistant":
            others = f"stands in a message of {role!r}; only the assistant calls tools"
            raise Fault(f"{place}['tool_calls'] {others}")
        checked["tool_calls"] = _calls(calls, f"{place}['tool_calls']")
    checked["content"] = _content(checked.get("content"), place, bool(calls))
    if weight is not None:
        if weight not in (0, 1):
            raise Fault(f"{place}['weight'] is {weight!r}; it is 1 for a turn to learn, or 0")
        checked["weight"] = int(weight)
    says_something = checked["content"].strip() or calls or checked.get("reasoning_content")
    if role == "assistant" and not says_something:
        raise Fault(f"{place}['content'] of the assistant is empty")
    return checked


def _role(message: Mapping[Any, Any], place: str) -> str:
    if "role" not in message:
        hint = ""
        if "from" in message:
            hint = " 'from' and 'value' are called 'role' and 'content' here."
        raise Fault(f"{place} has no 'role'.{hint}")
    role = message["role"]
    if role in ROLES:
        return role
    hint = nearest(str(role), ROLES)
    if str(role) in _ROLE_ELSEWHERE:
        hint = f" Did you mean {_ROLE_ELSEWHERE[str(role)]!r}?"
    raise Fault(f"{place}['role'] is {role!r}; it is one of {', '.join(ROLES)}.{hint}")


def _content(content: Any, place: str, has_calls: bool) -> str:
    """Return the text of a message; one that calls tools may have none."""
    if isinstance(content, str):
        return content
    if content is None and has_calls:
        return ""
    if content is None:
        raise Fault(f"{place} has no 'content'")
    if not isinstance(content, (list, tuple)):
        raise Fault(f"{place}['content'] is {type_name(content)}, not a string")
    return "".join(_text_part(part, f"{place}['content'][{n}]") for n, part in enumerate(content))


def _text_part(part: Any, place: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    what = "not a dict with 'text'"
    if kind and kind != "text":
        what = f"of the type {kind!r}"
    raise Fault(f"{place} is {what}; only text can be trained on")


def _calls(calls: Any, place: str) -> list[dict[str, Any]]:
    if not isinstance(calls, (list, tuple)):
        raise Fault(f"{place} is {type_name(calls)}, not a list")
    return [_call(call, f"{place}[{n}]") for n, call in enumerate(calls)]


def _call(call: Any, place: str) -> dict[str, Any]:
    """Return a tool call with its arguments as a dict.

    Two forms are in use: ``{"function": {"name": …, "arguments": …}}``, and the inner dict alone.
    """
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise Fault(f"{place} has no 'function' with a 'name'")
    arguments = function.get("arguments", {})
    where = f"{place}['function']['arguments']"
    if isinstance(arguments, str):
        arguments = _parsed(arguments, where)
    if not isinstance(arguments, Mapping):
        raise Fault(f"{where} is {type_name(arguments)}, not a dict or its JSON text")
    if "function" in call:
        return {**call, "function": {**function, "arguments": arguments}}
    return {**call, "arguments": arguments}


def tools(value: Any) -> list[Any] | None:
    """Return tools as templates read them: a list of JSON schemas, or None.

    Args:
        value: what the row has under ``tools``: a list, its JSON text, or None.

    Raises:
        Fault: they are not that.
    """
    if isinstance(value, str):
        value = _parsed(value, "'tools'")
    if value is None or value == []:
        return None
    if not isinstance(value, (list, tuple)):
        raise Fault(f"'tools' is {type_name(value)}, not a list of JSON schemas")
    for n, tool in enumerate(value):
        _check_tool(tool, f"'tools'[{n}]")
    return list(value)


def _check_tool(tool: Any, place: str) -> None:
    """Refuse what is no schema; templates turn a Python function into its schema themselves."""
    if not isinstance(tool, Mapping):
        if callable(tool):
            return
        raise Fault(f"{place} is {type_name(tool)}, not a JSON schema of a function")
    function = tool.get("function", tool)
    if not isinstance(function, Mapping):
        raise Fault(f"{place} is {type_name(tool)}, not a JSON schema of a function")
    if not isinstance(function.get("name"), str):
        raise Fault(f"{place} has no 'name'")


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise Fault(f"{place} is not JSON: {error}") from None


def type_name(value: Any) -> str:
    """Return what a value is, in words: ``a list``, ``an int``, ``nothing`` for None."""
    if value is None:
        return "nothing"
    name = type(value).__name__
    article = "an" if name[0] in "aeiou" else "a"
    return f"{article} {name}"
