"""Answers: what stock mlx-lm writes, without touching its limits; and prompts that no model can answer."""

from __future__ import annotations

import mlx.core as mx
import pytest

import qlab
from qlab.engine.data import text
from qlab.runtime.job import mlx_call
from qlab.engine.evaluate.generate import checked_prompts
from qlab.engine.evaluate.generate import prompt_tokens
from qlab.engine.evaluate.generate import reply
from qlab.errors import ConfigError
from qlab.errors import DataError
from tests import templates
from tests.tiny import on_mlx


@pytest.mark.parametrize("prompt", ["The house", "She was", "a"])
def test_an_answer_is_the_one_that_stock_mlx_lm_gives(demo, prompt):
    @on_mlx
    def stock() -> str:
        from mlx_lm import generate

        return generate(demo.module, demo.tokenizer, prompt, max_tokens=12)

    assert (
        demo.generate(prompt, 12).removeprefix(" ") == stock() != ""
    )  # which drops the space between prompt and answer


def test_limits_stay_as_they_are_while_a_model_answers(demo, monkeypatch):
    for name in ("set_wired_limit", "set_memory_limit", "set_cache_limit"):
        monkeypatch.setattr(mx, name, lambda *_: pytest.fail("a limit was set"))
    text = mlx_call(reply, demo.module, demo.tokenizer, "The", 3)
    assert len(demo.tokenizer.encode(text)) == 3 and demo.generate("The", 6).startswith(text)


@pytest.mark.parametrize(
    ("prompt", "tokens", "says"),
    [
        (None, 4, "prompt=None is not legal"),
        (7, 4, "prompt=7 is not legal"),
        (["a"], 4, r"prompt=\['a'\] is not legal"),
        ("", 4, "The prompt is empty"),
        ("a", 0, "max_tokens=0 is not legal"),
        ("a", 2.0, "max_tokens=2.0 is not legal"),
        ("a", True, "max_tokens=True is not legal"),
    ],
)
def test_what_no_model_can_answer_is_refused(demo, prompt, tokens, says):
    with pytest.raises(ConfigError, match=says):
        demo.generate(prompt, tokens)
    with pytest.raises(ConfigError, match=says):
        qlab.Adapter(demo, rank=2, num_layers=1).generate(prompt, tokens)


def test_a_token_that_the_model_does_not_know_never_reaches_it(demo):
    with pytest.raises(
        ConfigError,
        match=r"The prompt cannot be used: token \d+ is outside the model's vocabulary \(0–2\);",
    ):
        prompt_tokens(demo.tokenizer, "The house", 3)
    with pytest.raises(ConfigError, match="the tokenizer knows more"):
        checked_prompts(templates.speaking(demo.tokenizer, templates.CHATML), ["hello"], 3)
    with pytest.raises(
        DataError,
        match=r"The text cannot be used: token \d+ is outside the model's vocabulary \(0–2\);",
    ):
        text.batches(demo.tokenizer, None, "calibration.txt", 64, 3)
    assert demo.spec.vocabulary == 2048


def test_one_prompt_or_several(demo):
    assert checked_prompts(demo.tokenizer, "a", None) == ("a",)
    assert checked_prompts(demo.tokenizer, (p for p in "ab"), None) == ("a", "b")
