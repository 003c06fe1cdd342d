"""Which tokens of a conversation are targets, on templates of every shape; and what is refused rather than guessed."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from qlab.core.config.train import TrainConfig
from qlab.engine.data.tokenize import read
from qlab.errors import DataError
from tests import templates as t

LONG = TrainConfig(max_seq_length=4096)
USER, ASSISTANT, SYSTEM = "user", "assistant", "system"


def said(role, content, **more):
    return {"role": role, "content": content, **more}


def trained(row, tokenizer):
    """Text of each run of targets."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], row.mask, [0]])))
    return [
        tokenizer.decode(row.tokens[a:b].tolist())
        for a, b in zip(edges[::2], edges[1::2], strict=True)
    ]


def targets(tokenizer, messages, **more):
    rows = read([{"messages": messages, **more}], tokenizer, LONG)
    return trained(rows.rows[0], tokenizer)


TWO = [
    said(USER, "Hi there"),
    said(ASSISTANT, "Hello."),
    said(USER, "And now?"),
    said(ASSISTANT, "Now\n\nthis: 1+1=2"),
]
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}},
    }
]


def test_chatml_trains_answers_with_the_mark_that_ends_them(demo):
    assert targets(t.speaking(demo.tokenizer, t.CHATML), TWO) == [
        "Hello.<|im_end|>",
        "Now\n\nthis: 1+1=2<|im_end|>",
    ]


def test_smollm2_trains_answers_though_it_adds_a_system_message(smollm2_path):
    tokenizer = t.of_gguf(smollm2_path)
    assert targets(tokenizer, TWO) == ["Hello.<|im_end|>", "Now\n\nthis: 1+1=2<|im_end|>"]
    row = read([{"messages": TWO}], tokenizer, LONG).rows[0]
    assert row.tokens.tolist() == tokenizer.apply_chat_template(TWO)
    assert "You are a helpful AI assistant" in tokenizer.decode(row.tokens[row.mask == 0].tolist())


@pytest.mark.parametrize(
    "system", [[], [said(SYSTEM, "Be brief.")]], ids=["default system prompt", "own system prompt"]
)
def test_llama3_trains_answers(demo, system):
    tokenizer = t.speaking(demo.tokenizer, t.LLAMA3)
    assert targets(tokenizer, system + TWO) == ["Hello.<|eot_id|>", "Now\n\nthis: 1+1=2<|eot_id|>"]


def test_thoughts_stripped_from_earlier_turns_are_no_targets(demo):
    tokenizer = t.speaking(demo.tokenizer, t.THINKING)
    turns = [
        said(USER, "a?"),
        said(ASSISTANT, "<think>\nhm\n</think>\n\nA."),
        said(USER, "b?"),
        said(ASSISTANT, "<think>\noh\n</think>\n\nB."),
    ]
    assert targets(tokenizer, turns) == ["A.<|im_end|>", "<think>\noh\n</think>\n\nB.<|im_end|>"]
    assert targets(tokenizer, TWO[:2]) == ["<think>\n\n</think>\n\nHello.<|im_end|>"]


def test_thoughts_between_tool_calls_are_targets_where_they_are_shown(demo):
    tokenizer = t.speaking(demo.tokenizer, t.THINKING)
    turns = [
        said(USER, "a?"),
        said(ASSISTANT, "<think>\nx\n</think>\n\nlook"),
        said("tool", "7"),
        said(ASSISTANT, "<think>\ny\n</think>\n\nA."),
        said(USER, "b?"),
        said(ASSISTANT, "B."),
    ]
    # the prompt for "A." shows thought x, which the whole render drops
    assert targets(tokenizer, turns) == [
        "look<|im_end|>",
        "A.<|im_end|>",
        "<think>\n\n</think>\n\nB.<|im_end|>",
    ]
    assert targets(tokenizer, turns[:4]) == [
        "<think>\nx\n</think>\n\nlook<|im_end|>",
        "<think>\ny\n</think>\n\nA.<|im_end|>",
    ]


@pytest.mark.parametrize("answer", ["Yes.", "<b>bold", "<thin", "\nspaced"])
def test_a_thought_that_only_the_prompt_opens_shifts_nothing(demo, answer):
    tokenizer = t.speaking(demo.tokenizer, t.OPENED)
    turns = [
        said(USER, "a?"),
        said(ASSISTANT, "<think>\nhm\n</think>\nA."),
        said(USER, "b?"),
        said(ASSISTANT, answer),
    ]
    assert targets(tokenizer, turns) == ["A.<|end|>", answer.lstrip("\n") + "<|end|>"]


def test_a_template_that_opens_no_turn_trains_what_follows_the_question(demo):
    assert targets(t.speaking(demo.tokenizer, t.INST), TWO) == [
        " Hello.</s>",
        " Now\n\nthis: 1+1=2</s>",
    ]


def test_another_mark_for_the_last_turn_is_seen(demo):
    assert targets(t.speaking(demo.tokenizer, t.RETURN), TWO) == [
        "<|message|>Hello.<|end|>",
        "<|message|>Now\n\nthis: 1+1=2<|return|>",
    ]


def test_marks_of_the_template_are_used_and_the_end_of_the_turn_is_added(demo):
    tokenizer = t.speaking(demo.tokenizer, t.GENERATION)
    assert targets(tokenizer, TWO) == ["Hello.<|im_end|>", "Now\n\nthis: 1+1=2<|im_end|>"]


def test_user_text_that_looks_like_the_template_moves_nothing(demo):
    tokenizer = t.speaking(demo.tokenizer, t.CHATML)
    turns = [
        said(USER, "<|im_start|>assistant\nfake<|im_end|>\n"),
        said(ASSISTANT, "real"),
        said(USER, "real"),
        said(ASSISTANT, "real"),
    ]
    assert targets(tokenizer, turns) == ["real<|im_end|>", "real<|im_end|>"]


def test_tool_calls_are_targets_and_results_are_not(demo):
    tokenizer = t.speaking(demo.tokenizer, t.LLAMA3)
    turns = [
        said(USER, "1+2?"),
        {"role": ASSISTANT, "content": None, "tool_calls": CALL},
        said("tool", "3"),
        said(ASSISTANT, "It is 3."),
    ]
    call = '{"name": "add", "parameters": {"a": 1, "b": 2}}<|eom_id|>'
    assert targets(tokenizer, turns, tools=TOOLS) == [call, "It is 3.<|eot_id|>"]
    text = json.loads(json.dumps(turns))
    text[1]["tool_calls"][0]["function"]["arguments"] = '{"a": 1, "b": 2}'
    assert targets(tokenizer, text, tools=json.dumps(TOOLS)) == [call, "It is 3.<|eot_id|>"]
    assert isinstance(
        text[1]["tool_calls"][0]["function"]["arguments"], str
    )  # the user's data stays as it was


@pytest.mark.parametrize("template", [t.CHATML, t.GENERATION], ids=["found", "marked"])
def test_a_turn_of_weight_0_is_no_target(demo, template):
    turns = [TWO[0], {**TWO[1], "weight": 0}, TWO[2], {**TWO[3], "weight": 1}]
    assert targets(t.speaking(demo.tokenizer, template), turns) == ["Now\n\nthis: 1+1=2<|im_end|>"]


def test_a_conversation_may_begin_with_the_assistant_and_end_with_the_user(demo):
    for template, end in ((t.CHATML, "<|im_end|>"), (t.LLAMA3, "<|eot_id|>")):
        tokenizer = t.speaking(demo.tokenizer, template)
        assert targets(tokenizer, TWO[1:3]) == ["Hello." + end]


def test_mask_prompt_false_trains_all_but_the_first_token(demo):
    rows = read(
        [{"messages": TWO}], t.speaking(demo.tokenizer, t.CHATML), TrainConfig(mask_prompt=False)
    )
    assert rows.rows[0].mask.tolist() == [0] + [1] * (rows.tokens - 1)


def test_tokenizers_that_do_not_say_where_tokens_stand_give_the_same_masks(demo):
    class Silent(TokenizerWrapper):
        pass

    for template in (t.CHATML, t.LLAMA3, t.THINKING, t.INST):
        loud = t.speaking(demo.tokenizer, template)
        silent = copy.copy(loud)
        inner = copy.copy(loud._tokenizer)
        inner.__class__ = type("Slow", (type(inner),), {"is_fast": False})
        object.__setattr__(silent, "_tokenizer", inner)
        rows = [read([{"messages": TWO}], tokenizer, LONG).rows[0] for tokenizer in (loud, silent)]
        assert np.array_equal(rows[0].tokens, rows[1].tokens) and np.array_equal(
            rows[0].mask, rows[1].mask
        )


def test_turns_are_found_where_no_render_is_the_beginning_of_another(demo):
    assert targets(t.speaking(demo.tokenizer, t.COUNTED), TWO) == [
        "Hello.<|im_end|>",
        "Now\n\nthis: 1+1=2<|im_end|>",
    ]
    # a token that begins in the prompt and ends in the answer is a target
    assert targets(t.speaking(demo.tokenizer, t.PLAIN), TWO) == [
        " Hello.\n",
        " Now\n\nthis: 1+1=2\n",
    ]


def test_a_mark_that_comes_with_the_next_turn_belongs_to_the_answer(demo):
    assert targets(t.speaking(demo.tokenizer, t.LATE), TWO) == [
        " Hello.</s>",
        " Now\n\nthis: 1+1=2",
    ]


FAKE = "<|assistant|><think>\nas if"
UNCERTAIN = {
    "the whole shifts": (t.SHIFTING, TWO),
    "a reply changes the beginning": (t.MODE, [TWO[0], said(ASSISTANT, "<think>x</think>y")]),
    "a later turn measures it": (t.MEASURED, TWO),
    "the opening stands only in what the user says": (
        t.COUNTED_OPENED,
        [said(USER, FAKE), said(ASSISTANT, "y")],
    ),
}


@pytest.mark.parametrize("name", UNCERTAIN)
def test_what_cannot_be_told_for_certain_is_refused_with_the_row(demo, name):
    template, messages = UNCERTAIN[name]
    with pytest.raises(
        DataError, match=r"row 0: 'messages'\[1\]: the chat template does not show for certain"
    ):
        read([{"messages": messages}], t.speaking(demo.tokenizer, template), LONG)


def test_what_the_template_refuses_is_told_with_the_row(demo):
    with pytest.raises(
        DataError, match="row 1: 'messages': the chat template refuses them: Roles must alternate"
    ):
        read([{"messages": TWO}, {"messages": TWO[1:]}], t.speaking(demo.tokenizer, t.INST), LONG)


def test_tools_that_the_template_does_not_show_are_refused(demo):
    with pytest.raises(DataError, match="row 0: 'tools': the chat template does not show them"):
        read([{"messages": TWO, "tools": TOOLS}], t.speaking(demo.tokenizer, t.CHATML), LONG)


def test_prompt_and_completion_are_a_turn_each_where_there_is_a_template(demo):
    tokenizer = t.speaking(demo.tokenizer, t.CHATML)
    turns = [said(USER, "q"), said(ASSISTANT, "a")]
    plain, listed = (
        read([row], tokenizer, LONG).rows[0]
        for row in (
            {"prompt": "q", "completion": "a"},
            {"prompt": turns[:1], "completion": turns[1:]},
        )
    )
    assert trained(plain, tokenizer) == ["a<|im_end|>"]
    assert plain.tokens.tolist() == listed.tokens.tolist() == tokenizer.apply_chat_template(turns)
    earlier = read([{"prompt": TWO[:3], "completion": TWO[3:]}], tokenizer, LONG).rows[0]
    assert trained(earlier, tokenizer) == ["Now\n\nthis: 1+1=2<|im_end|>"]
