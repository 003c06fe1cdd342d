"""Data that cannot be trained on: each has its own clear message, and none is half read."""

from __future__ import annotations

import copy
import math

import pytest

from qlab.core.train.rows import Row
from qlab.core.train.rows import Rows
from qlab.core.config.train import TrainConfig
from qlab.engine.data.tokenize import read
from qlab.engine.data.batches import Feed
from qlab.errors import DataError
from tests import templates as t

U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
TOOL = [{"type": "function", "function": {"name": "add"}}]


def call(**function):
    return {
        "messages": [U, {"role": "assistant", "tool_calls": [{"function": function}]}],
        "tools": TOOL,
    }


ROWS = {
    "a number": (5, "row 1: it is an int, not a dict or a string"),
    "nothing": (None, "row 1: it is nothing, not a dict or a string"),
    "no keys": ({}, "row 1: it has no keys; it needs 'text'"),
    "other keys": ({"foo": 1, "bar": 2}, "row 1: it has 'foo', 'bar'; it needs 'text'"),
    "misspelt key": ({"mesages": [U, A]}, "Did you mean 'messages'?"),
    "alpaca": (
        {"instruction": "a", "input": "", "output": "b"},
        "row 1: it has 'instruction' and 'output'; call them 'prompt' and 'completion'",
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "a"}]},
        "row 1: it has 'conversations'; call it 'messages'",
    ),
    "two ways": (
        {"text": "a", "messages": [U, A]},
        "row 1: it has 'text' and 'messages'; a row is given in one way",
    ),
    "all three": (
        {"text": "a", "prompt": "a", "completion": "b"},
        "row 1: it has 'text' and 'prompt'; a row is given in one way",
    ),
    "text a number": ({"text": 3}, "row 1: 'text' is an int, not a string"),
    "text bytes": ({"text": b"abc"}, "row 1: 'text' is a bytes, not a string"),
    "text NaN": ({"text": math.nan}, "row 1: 'text' holds nothing"),
    "text and messages None": (
        {"text": None, "messages": None},
        "row 1: 'text' and 'messages' hold nothing",
    ),
    "half a character": ({"text": "a \ud83d b"}, "row 1: 'text' cannot be tokenized"),
    "no completion": ({"prompt": "a"}, "row 1: 'completion' is missing beside 'prompt'"),
    "misspelt completion": (
        {"prompt": "a", "completions": "b"},
        "Did you mean 'completion' by 'completions'?",
    ),
    "no prompt": ({"completion": "a"}, "row 1: 'prompt' is missing beside 'completion'"),
    "empty completion": ({"prompt": "a", "completion": " \n"}, "row 1: 'completion' is empty"),
    "prompt a list of strings": (
        {"prompt": ["a"], "completion": [A]},
        "row 1: 'prompt'[0] is a str, not a dict with 'role' and 'content'",
    ),
    "completion a string beside a chat": (
        {"prompt": [U], "completion": "a"},
        "row 1: 'completion' is a str, not a list of messages",
    ),
    "completion a dict": (
        {"prompt": "a", "completion": {"a": 1}},
        "row 1: 'completion' is a dict, not a string",
    ),
    "messages a string": ({"messages": "hi"}, "row 1: 'messages' is a str, not a list of messages"),
    "messages empty": ({"messages": []}, "row 1: 'messages' is empty"),
    "message a string": (
        {"messages": [U, "a"]},
        "row 1: 'messages'[1] is a str, not a dict with 'role' and 'content'",
    ),
    "no role": ({"messages": [{"content": "a"}, A]}, "row 1: 'messages'[0] has no 'role'"),
    "from and value": (
        {"messages": [{"from": "human", "value": "a"}]},
        "'from' and 'value' are called 'role' and 'content' here",
    ),
    "misspelt role": (
        {"messages": [U, {"role": "asistant", "content": "a"}]},
        "row 1: 'messages'[1]['role'] is 'asistant'; it is one of system",
    ),
    "other words for roles": (
        {"messages": [{"role": "human", "content": "a"}]},
        "Did you mean 'user'?",
    ),
    "no content": ({"messages": [{"role": "user"}, A]}, "row 1: 'messages'[0] has no 'content'"),
    "content a number": (
        {"messages": [{"role": "user", "content": 4}, A]},
        "row 1: 'messages'[0]['content'] is an int, not a string",
    ),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, A]},
        "'messages'[0]['content'][0] is of the type 'image'; only text",
    ),
    "answer empty": (
        {"messages": [U, {"role": "assistant", "content": ""}]},
        "row 1: 'messages'[1]['content'] of the assistant is empty",
    ),
    "no answer": (
        {"messages": [U]},
        "row 1: 'messages' has no message of the assistant to learn; with mask_prompt=False",
    ),
    "all of weight 0": (
        {"messages": [U, {**A, "weight": 0}]},
        "row 1: 'messages' has no message of the assistant to learn",
    ),
    "weight a half": (
        {"messages": [U, {**A, "weight": 0.5}]},
        "row 1: 'messages'[1]['weight'] is 0.5; it is 1",
    ),
    "the user calls a tool": (
        {"messages": [{**U, "tool_calls": [{}]}, A]},
        "only the assistant calls tools",
    ),
    "call without a name": (
        call(arguments={}),
        "row 1: 'messages'[1]['tool_calls'][0] has no 'function' with a 'name'",
    ),
    "arguments no JSON": (
        call(name="add", arguments="{a: 1}"),
        "['tool_calls'][0]['function']['arguments'] is not JSON",
    ),
    "arguments a list": (
        call(name="add", arguments="[1]"),
        "['function']['arguments'] is a list, not a dict",
    ),
    "tools a number": (
        {"messages": [U, A], "tools": 3},
        "row 1: 'tools' is an int, not a list of JSON schemas",
    ),
    "tools no JSON": ({"messages": [U, A], "tools": "[{"}, "row 1: 'tools' is not JSON"),
    "tool a string": (
        {"messages": [U, A], "tools": ["add"]},
        "row 1: 'tools'[0] is a str, not a JSON schema",
    ),
    "tool without a name": (
        {"messages": [U, A], "tools": [{"type": "function", "function": {}}]},
        "row 1: 'tools'[0] has no 'name'",
    ),
    "tools beside text": ({"text": "a", "tools": TOOL}, "row 1: 'tools' needs 'messages'"),
}


@pytest.mark.parametrize("name", ROWS)
def test_row_is_refused(demo, name):
    row, message = ROWS[name]
    before = copy.deepcopy(row)
    with pytest.raises(DataError) as error:
        read([{"text": "fine"}, row], t.speaking(demo.tokenizer, t.LLAMA3), TrainConfig())
    assert message in str(error.value) and "1 of 2 rows cannot be used" in str(error.value)
    assert row == before or name == "text NaN"


WHOLES = {
    "nothing": (None, "The data is nothing; give a list"),
    "a number": (3, "The data is an int; give a list"),
    "bytes": (b"text", "The data is a bytes; give a list"),
    "a set, which has no order": ({"a", "b"}, "The data is a set; give a list"),
    "no rows": ([], "The data gives nothing to train on: it holds no rows"),
    "empty text": (" ", "The text is empty"),
    "one row as a dict": ({"text": "a"}, "The data is one dict; give a list of dicts"),
    "columns of different length": (
        {"prompt": ["a", "b"], "completion": ["c"]},
        "The columns differ in length: 'prompt' has 2, 'completion' has 1",
    ),
    "only empty rows": ([{"text": ""}] * 3, "none of 3 rows has a target: it is empty (row 0)"),
    "a set on the hub": ("tatsu-lab/alpaca", "give datasets.load_dataset('tatsu-lab/alpaca')"),
}


@pytest.mark.parametrize("name", WHOLES)
def test_data_is_refused(demo, name):
    data, message = WHOLES[name]
    with pytest.raises(DataError) as error:
        read(data, demo.tokenizer, TrainConfig())
    assert message in str(error.value)


FILES = {
    "empty.jsonl": (b"", "empty.jsonl is empty"),
    "empty.txt": (b"  \n", "empty.txt is empty"),
    "broken.jsonl": (
        b'{"text": "a"}\n{"text": \n\n{x}\n',
        "2 of 3 rows cannot be used:\n- row 1: line 2 of broken.jsonl is not JSON: Expecting value at column 10\n- row 2: line 4 ",
    ),
    "broken.json": (b'[{"text": "a"}', "broken.json is not JSON"),
    "lines.json": (
        b'{"text": "a"}\n{"text": "b"}\n',
        "It holds several rows, one a line: name it .jsonl",
    ),
    "scalar.json": (b'"text"', "scalar.json holds a str; it must hold a list of rows"),
    "latin1.jsonl": (
        '{"text": "é"}'.encode("latin-1"),
        "latin1.jsonl is not UTF-8 text: byte 10 is 0xe9",
    ),
    "ragged.csv": (
        b"prompt,completion\na,b\nc\n",
        "- row 1: line 3 of ragged.csv has not as many cells as the 2 columns",
    ),
    "quotes.csv": (b'text\n"a"b\n', "line 2 of quotes.csv cannot be read"),
    "broken.parquet": (b"PAR1 no", "broken.parquet is not a Parquet file"),
    "rows.xlsx": (b"x", "rows.xlsx is not read here; give a file of one of the kinds .jsonl"),
}


@pytest.mark.parametrize("name", FILES)
def test_file_is_refused(demo, tmp_path, name):
    content, message = FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read(tmp_path / name, demo.tokenizer, TrainConfig())
    assert message in str(error.value)
    assert (tmp_path / name).read_bytes() == content


def test_missing_file_and_folder_name_what_is_there(demo, tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(
        DataError, match=r"There is no file .*trian.jsonl'. Did you mean 'train.jsonl'\?"
    ):
        read(str(tmp_path / "trian.jsonl"), demo.tokenizer, TrainConfig())
    with pytest.raises(DataError, match="is a folder; give one file of it: train.jsonl"):
        read(tmp_path, demo.tokenizer, TrainConfig())


def test_a_set_of_splits_names_its_splits(demo):
    import datasets

    part = datasets.Dataset.from_list([{"text": "a"}])
    with pytest.raises(
        DataError,
        match=r"a set of splits \(train, test\); give one of them, such as data\['train'\]",
    ):
        read(datasets.DatasetDict(train=part, test=part), demo.tokenizer, TrainConfig())


def test_messages_without_a_template_name_the_way_out(demo):
    with pytest.raises(
        DataError, match="row 0: 'messages' needs a chat template.*give 'prompt' and 'completion'"
    ):
        read([{"messages": [U, A]}], demo.tokenizer, TrainConfig())


def test_all_faults_are_told_at_once_and_the_list_stays_short(demo):
    with pytest.raises(DataError) as error:
        read([{f"tex{i}": "?"} for i in range(50)] + ["fine"], demo.tokenizer, TrainConfig())
    lines = str(error.value).splitlines()
    assert (
        lines[0].startswith("50 of 51 rows cannot be used")
        and len(lines) == 22
        and lines[-1] == "… and 30 more."
    )
    assert lines[20].startswith("- row 19: ") and "tex19" in lines[20]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_lines_that_cannot_be_read_are_told_with_all_other_faults(demo, tmp_path, name):
    jsonl = '{"text": 1}\n{"text"\n{"txt": "a"}\n\n{"text": "fine"}\nnull\n'
    (tmp_path / name).write_text(
        {"rows.jsonl": jsonl, "rows.csv": "txt,prompt\na,\na\n,\nc,b\n"}[name]
    )
    told = {
        "rows.jsonl": [
            "4 of 5",
            "row 0: 'text' is an int",
            "row 1: line 2 of",
            "row 2: it has 'txt'",
            "row 4: it is nothing, not a dict",
        ],
        "rows.csv": ["4 of 4", "rows 0, 2, 3: 'completion' is missing", "row 1: line 3 of"],
    }[name]
    with pytest.raises(DataError) as error:
        read(tmp_path / name, demo.tokenizer, TrainConfig())
    assert [words for words in told if words not in str(error.value)] == []
    assert len(str(error.value).splitlines()) == len(told)


def test_what_is_wrong_with_many_rows_is_said_once(demo):
    rows = [{"text": i} for i in range(50)]
    with pytest.raises(DataError) as error:
        read([*rows[:2], {"text": ["?"]}, "fine", *rows[2:]], demo.tokenizer, TrainConfig())
    assert str(error.value).splitlines() == [
        "51 of 52 rows cannot be used:",
        "- rows 0, 1, 4, 5, 6 and 45 more: 'text' is an int, not a string",
        "- row 2: 'text' is a list, not a string",
    ]


def test_a_source_that_fails_says_at_which_row(demo):
    def rows():
        yield "fine"
        raise RuntimeError("connection lost")

    with pytest.raises(DataError, match="The data failed at row 1: RuntimeError: connection lost"):
        read(rows(), demo.tokenizer, TrainConfig())


def test_a_token_that_the_model_does_not_know_is_refused_with_its_row(demo):
    with pytest.raises(
        DataError,
        match=r"1 of 3 rows cannot be used:\n- row 1: token \d+ is outside the model's vocabulary \(0–299\)",
    ):
        read(["a b", {"text": "fine"}, "a b"], demo.tokenizer, TrainConfig(), 300)
    with pytest.raises(
        DataError,
        match=r"The text cannot be used: token \d+ is outside the model's vocabulary \(0–2\);",
    ):
        read(
            "Some running text, in which every token is far too high.",
            demo.tokenizer,
            TrainConfig(),
            3,
        )
    rows = read(["fine"], demo.tokenizer, TrainConfig(), demo.spec.vocabulary)
    assert read(rows, demo.tokenizer, TrainConfig(), demo.spec.vocabulary) is rows
    with pytest.raises(DataError, match=r"1 of 1 rows cannot be used:\n- row 0: token"):
        read(rows, demo.tokenizer, TrainConfig(), 2)


def test_feeding_nothing_and_holding_out_everything_are_refused(demo):
    with pytest.raises(DataError, match="no rows"):
        Feed(Rows(()), TrainConfig())
    rows = read(["a b", "c d", "e f"], demo.tokenizer, TrainConfig())
    for held in (3, 0, 1.5, 0.1):
        with pytest.raises(DataError, match="of 3 rows cannot be held out; hold out 1 to 2"):
            rows.split(held, 0)
    assert isinstance(rows.rows[0], Row)
