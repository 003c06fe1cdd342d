"""Conversations are brought to one form, and what is wrong in them is said with its place."""

from __future__ import annotations

import pytest

from qlab.engine.data.conversation import Fault, messages, tools, type_name

USER = {"role": "user", "content": "Hi"}


def test_a_value_is_named_with_its_article():
    assert [type_name(x) for x in ([], 3, None, {})] == ["a list", "an int", "nothing", "a dict"]


def test_parts_of_text_are_joined_and_what_is_none_is_dropped():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    given = {"role": "user", "content": parts, "name": None}
    assert messages([given], "messages") == [{"role": "user", "content": "ab"}]
    assert given["content"] is parts  # the user's own are not changed


def test_a_weight_is_kept_as_a_number():
    said = {"role": "assistant", "content": "x", "weight": 0.0}
    assert messages([said], "messages")[0]["weight"] == 0


@pytest.mark.parametrize("arguments", ['{"city": "Bonn"}', {"city": "Bonn"}])
def test_arguments_of_calls_are_read_from_json_too(arguments):
    call = {"name": "weather", "arguments": arguments}
    for form in (call, {"type": "function", "function": call}):
        said = {"role": "assistant", "tool_calls": [form]}
        [checked] = messages([said], "messages")
        function = checked["tool_calls"][0].get("function", checked["tool_calls"][0])
        assert function["arguments"] == {"city": "Bonn"} and checked["content"] == ""


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("Hi", "'m' is a str, not a list of messages"),
        ([], "'m' is empty"),
        ([3], r"'m'\[0\] is an int, not a dict"),
        ([{"from": "human", "value": "Hi"}], "are called 'role' and 'content' here"),
        ([{"role": "human", "content": "Hi"}], "Did you mean 'user'"),
        ([{"role": "user"}], "has no 'content'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "of the type 'image'; only text"),
        ([{"role": "assistant", "content": " "}], "of the assistant is empty"),
        ([{**USER, "tool_calls": [{}]}], "only the assistant calls tools"),
        ([{**USER, "weight": 2}], "it is 1 for a turn to learn, or 0"),
    ],
)
def test_a_message_that_is_none_is_said(value, words):
    with pytest.raises(Fault, match=words):
        messages(value, "m")


def test_tools_are_a_list_of_schemas_or_its_json():
    schema = {"type": "function", "function": {"name": "weather"}}
    assert tools([schema]) == [schema] and tools(None) is tools([]) is None
    assert tools('[{"name": "weather"}]') == [{"name": "weather"}]
    assert tools([type_name]) == [type_name]  # templates read a function themselves


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (3, "an int, not a list of JSON schemas"),
        ("{", "not JSON"),
        ([3], "not a JSON schema"),
        ([{"function": 3}], "not a JSON schema"),
        ([{}], "has no 'name'"),
    ],
)
def test_tools_that_are_none_are_said(value, words):
    with pytest.raises(Fault, match=words):
        tools(value)
