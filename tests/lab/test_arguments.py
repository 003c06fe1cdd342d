"""Values of a wrong kind are refused by every public method, with what is legal: none ends in a bare TypeError."""

from __future__ import annotations

import pytest

import qlab
from qlab.errors import ConfigError
from qlab.errors import DataError
from qlab.errors import QlabError

ROWS = [{"prompt": f"{n} and {n} is", "completion": f" {2 * n}."} for n in range(6)]
NOT_WHOLE = ["5", None, 2.5, True, -1]
NO_TEXT = [5, 2.5, True]


@pytest.fixture(scope="module")
def quantizer(demo):
    made = qlab.Quantizer(demo)
    yield made
    made.close()


@pytest.fixture(scope="module")
def trainer(demo):
    return qlab.Trainer(qlab.Adapter(demo, rank=2, num_layers=1), ROWS)


@pytest.mark.parametrize("value", NOT_WHOLE)
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("tokens", lambda q, value: q.evaluate(tokens=value)),
        ("tokens", lambda q, value: q.judge(tokens=value)),
        ("count", lambda q, value: q.evaluate_layers(value)),
        ("count", lambda q, value: q.report.worst(value)),
        ("max_tokens", lambda q, value: q.model.generate("a", value)),
    ],
    ids=["evaluate", "judge", "evaluate_layers", "worst", "generate"],
)
def test_a_number_that_is_not_whole_is_refused_with_what_is_legal(quantizer, name, call, value):
    with pytest.raises(ConfigError, match=rf"{name}={value!r} is not legal; it is a whole number"):
        call(quantizer, value)


@pytest.mark.parametrize("value", NO_TEXT)
@pytest.mark.parametrize(
    "call",
    [
        lambda q, value: q.evaluate(value),
        lambda q, value: q.predict(value),
        lambda q, value: q.quantize("searched", calibration=value),
    ],
    ids=["evaluate", "predict", "quantize"],
)
def test_what_is_no_text_is_refused(quantizer, call, value):
    with pytest.raises(QlabError, match=rf"{value!r}|{type(value).__name__}"):
        call(quantizer, value)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda q: q.allocate("4"), "bits_per_weight='4' is not legal"),
        (lambda q: q.allocate([4]), r"bits_per_weight=\[4\] is not legal"),
        (lambda q: q.measure(exact="yes"), "exact='yes' is not legal; it is True or False"),
        (lambda q: q.quantize(5), "5"),
        (lambda q: q.model.generate(5), "prompt=5 is not legal"),
    ],
)
def test_other_wrong_kinds_are_refused(quantizer, call, says):
    with pytest.raises(ConfigError, match=says):
        call(quantizer)


@pytest.mark.parametrize(
    ("settings", "kind", "says"),
    [
        ({"max_tokens": "5"}, ConfigError, "max_tokens='5' is not legal"),
        ({"max_tokens": 0}, ConfigError, "max_tokens=0 is not legal"),
        ({"keep": 2.0}, ConfigError, "keep=2.0 is not legal"),
        ({"keep": None}, ConfigError, "keep=None is not legal"),
        ({"match": 5}, ConfigError, "match=5|Unknown match 5"),
        ({"match": "exct"}, ConfigError, "Did you mean 'exact'"),
        ({"max_token": 5}, ConfigError, "Trainer.evaluate: 'max_token' is no .* 'max_tokens'"),
        ({"golden": 5}, DataError, "A golden set is a list of rows"),
        ({"golden": "questions"}, DataError, "A golden set is a list of rows"),
        ({"golden": [5]}, DataError, "row 0: it is int, not a dict"),
        ({"rows": 5}, QlabError, "5|int"),
        ({"rows": True}, QlabError, "True|bool"),
    ],
    ids=str,
)
def test_wrong_settings_of_an_evaluation_are_refused(trainer, settings, kind, says):
    with pytest.raises(kind, match=says):
        trainer.evaluate(**settings)


@pytest.mark.parametrize("value", ["5", None, 2.5, True, 0])
def test_length_of_an_answer_is_refused_by_a_trainer(trainer, value):
    with pytest.raises(ConfigError, match=rf"max_tokens={value!r} is not legal"):
        trainer.generate("a", value)


@pytest.mark.parametrize("name", [5, None, ["quantized"]])
def test_a_report_says_which_columns_it_has(name):
    from qlab.core.evaluate.judge import Column
    from qlab.core.evaluate.judge import JudgeReport

    report = JudgeReport(columns=(Column(name="quantized"),))
    with pytest.raises(ConfigError, match="there are quantized"):
        report[name]
    with pytest.raises(ConfigError, match="choose one of nll"):
        report.change(name, "quantized", "quantized")


@pytest.mark.parametrize("name", ["set", "unset", "state", "close", "to_html"])
def test_a_method_that_is_inherited_is_called_not_set(demo, name):
    q = qlab.Quantizer(demo)
    with pytest.raises(AttributeError, match="It is a method: call it"):
        setattr(q, name, 3)
    q.close()
