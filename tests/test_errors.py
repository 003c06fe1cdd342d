"""Typos are refused where they are made: settings of a call, and attributes set on what a notebook holds."""

from __future__ import annotations

import pytest

import qlab
from qlab.errors import ConfigError
from qlab.errors import DataError
from qlab.errors import LayerNotFoundError
from qlab.errors import LoadError
from qlab.errors import SaveError


@pytest.fixture(scope="module")
def held(demo, tmp_path_factory):
    """What a notebook holds, by name."""
    quantizer = qlab.Quantizer(demo)
    adapter = qlab.Adapter(quantizer)
    trainer = qlab.Trainer(
        adapter, ["A row of text."] * 4, val=0, path=tmp_path_factory.mktemp("runs") / "run"
    )
    live = qlab.estimate(quantizer).panel
    yield {
        "quantizer": quantizer,
        "adapter": adapter,
        "trainer": trainer,
        "model": demo,
        "estimate": live,
    }
    for one in (trainer, adapter, quantizer, live):
        one.close()


@pytest.mark.parametrize(
    ("holder", "name", "words"),
    [
        (
            "trainer",
            "learning_rte",
            "Did you mean 'learning_rate'",
        ),
        ("trainer", "evaluate", "It is a method: call it."),
        ("trainer", "resume", "It is a method: call it."),
        ("quantizer", "groupsize", "Did you mean 'group_size'"),
        ("quantizer", "allocate", "It is a method: call it."),
        ("adapter", "lora_alpha", "Did you mean 'alpha'"),
        ("adapter", "rnak", "Did you mean 'rank'"),
        ("model", "tokeniser", "Did you mean 'tokenizer'"),
        ("estimate", "setups", "Did you mean 'setup'"),
    ],
)
def test_attribute_that_is_not_there_cannot_be_set(held, holder, name, words):
    before = dict(vars(held[holder]))
    kind = type(held[holder]).__name__
    with pytest.raises(AttributeError, match=f"{kind} has no settable attribute '{name}'.*{words}"):
        setattr(held[holder], name, 1)
    assert vars(held[holder]) == before


def test_what_can_be_set_still_can(held):
    quantizer, adapter, trainer = held["quantizer"], held["adapter"], held["trainer"]
    quantizer.bits, quantizer.overrides, adapter.alpha, trainer.learning_rate = 3, {}, 8, 1e-3
    with quantizer.hold_trait_notifications():  # traitlets sets a method of the object for a while
        quantizer.mode = "mxfp4"
    adapter._own = 1
    assert (quantizer.mode, adapter.scale, trainer.learning_rate, adapter._own) == (
        "mxfp4",
        1.0,
        1e-3,
        1,
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda held: qlab.Quantizer(held["model"], bit=4),
            "Quantizer: 'bit' is no setting. Did you mean 'bits'",
        ),
        (
            lambda held: qlab.Adapter(held["model"], lora_alpha=16),
            "'lora_alpha' is no setting. Did you mean 'alpha'",
        ),
        (
            lambda held: qlab.Trainer(held["adapter"], ["a"], prompt="b"),
            "Did you mean 'prompts'.* prompts, callbacks.$",
        ),
        (
            lambda held: qlab.Quantizer("demo"),
            "model='demo' is not legal; give what qlab.load returned",
        ),
        (lambda held: held["quantizer"].predict(5), "The data is an int; give a list"),
        (lambda held: held["quantizer"].predict("corpus.txt"), "There is no file 'corpus.txt'"),
        (
            lambda held: setattr(held["quantizer"], "overrides", {"lm_head": 8}),
            r"overrides\['lm_head'\]=8 is not legal; it is a Q",
        ),
        (lambda held: qlab.QuantConfig(groupsize=32), "Did you mean 'group_size'"),
        (lambda held: qlab.QuantPlan(qlab.QuantConfig(), override={}), "Did you mean 'overrides'"),
    ],
)
def test_what_is_not_legal_is_refused_with_the_nearest(held, make, words):
    with pytest.raises((ConfigError, DataError), match=words):
        make(held)


def test_a_source_or_a_layer_that_is_no_name_is_refused(held):
    for source in (None, 5, "", " "):
        with pytest.raises(LoadError, match="is not legal; give a folder"):
            qlab.load(source)
    with pytest.raises(LayerNotFoundError, match="has no layer 3"):
        held["quantizer"].set(3)
    with pytest.raises(LayerNotFoundError, match="has no layer 'lm_heat'"):
        held["quantizer"].overrides = {"lm_heat": None}
    assert held["quantizer"].overrides == {}


def test_a_page_that_cannot_be_written_is_told(held, tmp_path):
    for holder in ("quantizer", "adapter", "trainer"):
        assert held[holder].to_html(tmp_path / "page.html") == str(tmp_path / "page.html")
        with pytest.raises(SaveError, match="cannot be written: No such file or directory"):
            held[holder].to_html(tmp_path / "nowhere" / "page.html")
