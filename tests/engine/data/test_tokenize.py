"""Rows from everything that people have, as tokens and targets."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from qlab.core.train.rows import Rows
from qlab.core.config.train import TrainConfig
from qlab.engine.data.tokenize import read
from tests import templates as t

CONFIG = TrainConfig(max_seq_length=64)
TEXTS = ["A first sentence.", "Another one, é 👍🏽.", "A third\nwith two lines."]
DICTS = [{"text": text} for text in TEXTS]


def same(rows: Rows, others: Rows) -> bool:
    return rows.fingerprint == others.fingerprint and rows.kind == others.kind


@pytest.fixture(scope="module")
def tokenizer(demo):
    return demo.tokenizer


def test_every_way_of_giving_rows_gives_the_same_rows(tokenizer, tmp_path):
    import datasets
    import pandas

    expected = read(DICTS, tokenizer, CONFIG)
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, DICTS)) + "\n")
    (tmp_path / "a.json").write_text(json.dumps(DICTS))
    (tmp_path / "columns.json").write_text(json.dumps({"text": TEXTS}))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "score"])
        writer.writeheader()
        writer.writerows({**row, "score": 1} for row in DICTS)
    frame = pandas.DataFrame(DICTS)
    frame.to_parquet(tmp_path / "a.parquet")
    ways = [
        TEXTS,
        tuple(DICTS),
        iter(DICTS),
        {"text": TEXTS},
        datasets.Dataset.from_list(DICTS),
        frame,
    ]
    ways += [
        tmp_path / "a.jsonl",
        str(tmp_path / "a.json"),
        *(tmp_path / f"{name}" for name in ("columns.json", "a.csv", "a.parquet")),
    ]
    for way in ways:
        assert same(read(way, tokenizer, CONFIG), expected), way
    assert [row.number for row in expected] == [0, 1, 2]


def test_line_separators_inside_json_strings_are_text(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one\u2028two"}\n', encoding="utf-8")
    assert len(read(tmp_path / "a.jsonl", tokenizer, CONFIG)) == 1


def test_text_is_a_target_but_for_its_first_token_and_ends_once(tokenizer):
    for text in (TEXTS[0], TEXTS[0] + tokenizer.eos_token):
        (row,) = read([text], tokenizer, CONFIG)
        assert row.tokens.tolist() == [*tokenizer.encode(TEXTS[0]), tokenizer.eos_token_id]
        assert row.mask.tolist() == [0] + [1] * (row.tokens.size - 1)
        assert row.tokens.dtype == np.int32 and row.mask.dtype == np.uint8


def test_a_beginning_that_the_tokenizer_adds_is_not_doubled(tokenizer):
    from tokenizers.processors import TemplateProcessing

    made = t.speaking(tokenizer, t.INST)
    first = made.convert_tokens_to_ids("<s>")
    made._tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", first)]
    )
    plain, marked = (
        read([text], made, CONFIG).rows[0].tokens.tolist() for text in ("[INST] a", "<s>[INST] a")
    )
    assert plain == marked and plain.count(first) == 1
    chat = read([{"prompt": "a", "completion": "b"}], made, CONFIG).rows[0].tokens.tolist()
    assert chat.count(first) == 1  # the template writes it; the tokenizer must not add another


def test_without_a_template_completions_are_joined_to_their_prompts(tokenizer):
    (row,) = read([{"prompt": "Q: why?\nA:", "completion": " because"}], tokenizer, CONFIG)
    head = tokenizer.encode("Q: why?\nA:")
    assert row.tokens.tolist() == [*head, *tokenizer.encode(" because"), tokenizer.eos_token_id]
    assert row.mask.tolist() == [0] * len(head) + [1] * (row.tokens.size - len(head))
    (whole,) = read(
        [{"prompt": "Q: why?\nA:", "completion": " because"}],
        tokenizer,
        TrainConfig(mask_prompt=False),
    )
    assert whole.mask.tolist() == [0] + [1] * (row.tokens.size - 1)


def test_an_end_that_the_tokenizer_adds_stands_at_the_end_alone(tokenizer):
    from tokenizers.processors import TemplateProcessing

    made = t.speaking(tokenizer, t.INST)
    made._tokenizer.chat_template, made.has_chat_template = None, False
    end = made.eos_token_id
    made._tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", end)]
    )
    for prompt, completion in (("Q: why?\nA:", " because"), ("the oth", "er")):
        (row,) = read([{"prompt": prompt, "completion": completion}], made, CONFIG)
        assert row.tokens.tolist().count(end) == 1 and row.tokens[-1] == end
        assert made.decode(row.tokens[row.mask == 1].tolist()) == completion + "</s>"


def test_no_token_reaches_over_the_end_of_a_prompt(tokenizer):
    together = tokenizer.encode("the other")
    prompt = "the oth"
    assert tokenizer.encode(prompt) != together[: len(tokenizer.encode(prompt))]
    (row,) = read([{"prompt": prompt, "completion": "er"}], tokenizer, CONFIG)
    assert row.tokens.tolist() == [
        *tokenizer.encode(prompt),
        *tokenizer.encode("er"),
        tokenizer.eos_token_id,
    ]


def test_kinds_may_be_mixed_and_what_is_none_is_absent(tokenizer):
    import datasets

    chatty = t.speaking(tokenizer, t.LLAMA3)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    other = {"type": "function", "function": {"name": "add", "arguments": {"b": 2}}}
    tools = [{"type": "function", "function": {"name": "add"}}]

    def asked(made):
        return [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [made]}]

    rows = [
        {"text": "one"},
        {"prompt": "a", "completion": "b"},
        {"messages": asked(call), "tools": tools},
        {"messages": asked(other), "tools": tools},
    ]
    mixed = read(rows, chatty, CONFIG)
    keys = ("text", "prompt", "completion", "messages", "tools")
    columns = datasets.Dataset.from_dict({key: [row.get(key) for row in rows] for key in keys})
    assert columns[2]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {
        "a": 1,
        "b": None,
    }
    assert mixed.kind == "mixed" and same(read(columns, chatty, CONFIG), mixed)


def test_other_columns_are_left_alone(tokenizer):
    assert read([{"text": "a b", "id": 7, "source": None}], tokenizer, CONFIG).kind == "text"


def test_running_text_is_cut_into_rows_that_train_every_token_once(tokenizer, tmp_path):
    text = "\n\n".join(TEXTS * 20)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    rows = read(tmp_path / "a.txt", tokenizer, TrainConfig(max_seq_length=16))
    tokens = [*tokenizer.encode(text), tokenizer.eos_token_id]
    assert np.concatenate([row.tokens[row.mask == 1] for row in rows]).tolist() == tokens[1:]
    assert max(rows.lengths) == 16 and same(
        read(text, tokenizer, TrainConfig(max_seq_length=16)), rows
    )


def test_rows_cut_to_nothing_and_empty_ones_are_dropped_and_counted(tokenizer):
    long = {"prompt": "word " * 50, "completion": "yes"}
    rows = read(
        [long, {"text": ""}, {"prompt": "a", "completion": " yes " * 50}],
        tokenizer,
        TrainConfig(max_seq_length=20),
    )
    assert [row.number for row in rows] == [2] and rows.rows[0].cut > 0 and rows.cut == 1
    assert rows.rows[0].tokens.size == 20
    (first, why), (second, other) = rows.dropped
    assert (first, second) == (0, 1) and "max_seq_length" in why and other == "it is empty"
    assert "1 cut, 2 dropped" in repr(rows)


def test_equal_rows_are_counted_and_stay_on_one_side_of_a_split(tokenizer):
    texts = [f"Sentence number {i % 23}." for i in range(60)]
    rows = read(texts, tokenizer, CONFIG)
    assert rows.duplicates == 60 - 23
    for seed in range(8):
        train, held = rows.split(0.2, seed)
        assert not {row.digest for row in train} & {row.digest for row in held}
        assert sorted(row.number for part in (train, held) for row in part) == list(range(60))
        assert 8 <= len(held) <= 12
    assert same(rows.split(12, 3)[1], rows.split(12, 3)[1]) and not same(
        rows.split(12, 3)[1], rows.split(12, 4)[1]
    )
    assert read(["One."] * 9, tokenizer, CONFIG).split(3, 0)[1].rows == ()


def test_fingerprint_sees_tokens_masks_and_order(tokenizer):
    rows = read(DICTS, tokenizer, CONFIG)
    assert not same(Rows(rows.rows[::-1]), rows)
    pair = [{"prompt": "a question", "completion": " b"}]
    masked, whole = (read(pair, tokenizer, TrainConfig(mask_prompt=mask)) for mask in (True, False))
    assert masked.fingerprint == read(pair, tokenizer, CONFIG).fingerprint != whole.fingerprint


def test_a_wrapper_is_what_mlx_lm_gives(tokenizer):
    assert isinstance(tokenizer, TokenizerWrapper)
