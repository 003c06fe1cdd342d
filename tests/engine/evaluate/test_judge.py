"""Judging against numbers worked out by hand: masks, chunks, kept predictions, answers, golden sets, and what is refused."""

from __future__ import annotations

import os
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from qlab.core.config.quant import QuantConfig
from qlab.core.config.lora import LoRAConfig
from qlab.engine.evaluate import judge as judging
from qlab.engine.evaluate import generate
from qlab.engine.evaluate import predict
from qlab.engine.evaluate import teacher
from qlab.engine.evaluate.golden import questions
from qlab.engine.evaluate.golden import score
from qlab.engine.evaluate.judge import judge
from qlab.nn.frozen import Compute
from qlab.engine.adapt.attach import attach
from qlab.engine.evaluate.teacher import teacher_predictions
from qlab.errors import ConfigError
from qlab.errors import DataError
from qlab.errors import UnsupportedError
from tests.tiny import dense, on_mlx, tiny

V = 97


def rows(count: int = 5, seed: int = 0) -> list[SimpleNamespace]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(6, 30, count)
    masks = [(np.arange(n) >= n // 3).astype(np.uint8) for n in lengths]
    return [
        SimpleNamespace(tokens=rng.integers(0, V, n).astype(np.int32), mask=m)
        for n, m in zip(lengths, masks, strict=True)
    ]


@on_mlx
def run(work):
    """Run a generator to its end."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


@pytest.fixture(scope="module")
def pair():
    """A model and its 3-bit twin, sharper than random weights make them."""
    module, spec = tiny()

    @on_mlx
    def sharpen(model):
        model.lm_head.weight = model.lm_head.weight * 8
        mx.eval(model.parameters())
        return model

    sharpen(module)
    return module, dense(module, spec, QuantConfig("affine", 3, 64))


class Letters:
    """A tokenizer whose tokens are characters."""

    chat_template = None
    eos_token_ids = frozenset({0})

    def encode(self, text: str) -> list[int]:
        return [ord(c) % V for c in text]

    def decode(self, tokens: list[int]) -> str:
        return "".join(chr(33 + t) for t in tokens)


@on_mlx
def log_probs(module, tokens: np.ndarray) -> np.ndarray:
    logits = np.array(module(mx.array(tokens[None]))[0].astype(mx.float32), np.float64)
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


def test_a_model_is_at_no_distance_from_itself(pair):
    report = run(judge(pair[0], {"same": pair[0]}, rows()))
    assert report["same"].kl_nats == pytest.approx(0, abs=1e-6) and report["same"].flips == 0
    assert report.change("nll", "same", "full precision") == (0, 0)


def test_figures_are_those_that_numpy_finds_on_the_targets(pair):
    data = rows()
    report = run(judge(pair[0], {"quantized": pair[1]}, data))
    p, q, right = [], [], []
    for row in data:
        where = np.flatnonzero(row.mask[1:])
        p.append(log_probs(pair[0], row.tokens)[where])
        q.append(log_probs(pair[1], row.tokens)[where])
        right.append(row.tokens[where + 1])
    sizes = [len(part) for part in right]
    p, q, right = (np.concatenate(x) for x in (p, q, right))
    index, found = np.arange(len(right)), report["quantized"]
    kl = (np.exp(p) * (p - q)).sum(1)
    assert report.targets == len(right) and report.rows == 5 and found.kl_nats > 0.01
    assert found.nll == pytest.approx(-q[index, right].mean(), rel=1e-5)
    assert report["full precision"].nll == pytest.approx(-p[index, right].mean(), rel=1e-5)
    assert found.kl_nats == pytest.approx(kl.mean(), rel=1e-4)
    assert found.kl_nats_p99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-3)
    assert found.flips == pytest.approx((p.argmax(1) != q.argmax(1)).mean())
    assert found.token_accuracy == pytest.approx((q.argmax(1) == right).mean())
    assert found.scores.targets.tolist() == sizes


def test_what_is_no_target_and_tells_the_model_nothing_changes_nothing(pair):
    data = rows(3)
    for row in data:
        row.mask[-1] = 0
    before = run(judge(pair[0], {"quantized": pair[1]}, data))
    for row in data:
        row.tokens[-1] = (row.tokens[-1] + 1) % V  # the last token is no input
        row.mask[0] = 1  # the first token is never a target
    after = run(judge(pair[0], {"quantized": pair[1]}, data))
    assert before.columns[1].nll == after.columns[1].nll and before.targets == after.targets


def test_a_mask_of_another_token_gives_another_figure(pair):
    data = rows(3)
    before = run(judge(pair[0], {}, data)).columns[0].nll
    data[0].mask[-1] = 0
    assert run(judge(pair[0], {}, data)).columns[0].nll != before


def test_chunks_of_logits_change_no_figure(pair, monkeypatch):
    whole = run(judge(pair[0], {"quantized": pair[1]}, rows()))
    monkeypatch.setattr(judging, "chunk_length", lambda _: 2)
    parts = run(judge(pair[0], {"quantized": pair[1]}, rows()))
    for name in ("nll", "kl_nats", "flips", "token_accuracy", "kl_nats_p99"):
        assert getattr(parts.columns[1], name) == pytest.approx(
            getattr(whole.columns[1], name), rel=1e-5
        )


def test_logits_of_a_large_vocabulary_come_in_small_chunks():
    assert predict.chunk_length(128_000) * 128_000 * 4 <= 64e6 and predict.chunk_length(10**9) == 1


def test_a_model_that_cannot_be_taken_apart_gives_the_same_figures(pair, monkeypatch):
    whole = run(judge(pair[0], {"quantized": pair[1]}, rows()))

    def refuse(_):
        raise UnsupportedError("no blocks")

    monkeypatch.setattr(predict, "BlockStack", refuse)
    other = run(judge(pair[0], {"quantized": pair[1]}, rows()))
    assert other.columns[1].kl_nats == pytest.approx(whole.columns[1].kl_nats, rel=1e-5)


@pytest.mark.parametrize("name", ["llama tied", "gemma2", "mixtral", "mamba"])
def test_other_architectures_are_at_no_distance_from_themselves(name):
    module, _ = tiny(name)
    assert run(judge(module, {"same": module}, rows(2)))["same"].kl_nats == pytest.approx(
        0, abs=1e-6
    )


def test_dropout_is_off_and_the_model_is_left_as_it_was(pair):
    module, spec = tiny()

    @on_mlx
    def adapted():
        made = attach(
            module, spec, LoRAConfig(rank=4, dropout=0.5), Compute(mx.float32, True), False
        )
        for path, layer in made.named_modules():
            if "lora_b" in layer:
                layer.lora_b = mx.random.normal(layer.lora_b.shape, key=mx.random.key(len(path)))
        mx.eval(made.parameters())
        made.train()
        return made

    made = adapted()
    first, second = (run(judge(module, {"a": made}, rows(3)))["a"] for _ in range(2))
    assert first.nll == second.nll and first.kl_nats > 0 and made.training


def test_rows_without_a_target_are_left_out_and_counted(pair):
    data = rows(3)
    data[1].mask[:] = 0
    report = run(judge(pair[0], {}, data))
    assert report.rows == 2 and "1 rows without a target" in report.notes[0]


def test_without_the_full_model_there_is_no_distance(pair):
    column = run(judge(None, {"quantized": pair[1]}, rows())).columns[0]
    assert np.isnan(column.kl_nats) and np.isnan(column.flips) and np.isfinite(column.nll)


def test_predictions_kept_whole_give_the_exact_figures(pair, tmp_path):
    exact = run(judge(pair[0], {"quantized": pair[1]}, rows()))
    kept = run(teacher_predictions(pair[0], rows(), V, tmp_path))
    report = run(judge(None, {"quantized": pair[1]}, rows(), predictions=kept))
    assert report.teacher == "exact" and report.floor_nats == 0
    for name in ("nll", "kl_nats", "flips", "token_accuracy"):
        for i in range(2):
            assert getattr(report.columns[i], name) == pytest.approx(
                getattr(exact.columns[i], name), rel=1e-4, abs=1e-6
            )


@pytest.mark.parametrize("keep", [1, 8, 32])
def test_predictions_kept_in_part_give_a_lower_bound_that_lacks_what_happens_in_the_tail(
    pair, tmp_path, keep
):
    exact, data = run(judge(pair[0], {"quantized": pair[1]}, rows())), rows()
    kept = run(teacher_predictions(pair[0], data, keep, tmp_path))
    report = run(judge(None, {"quantized": pair[1], "same": pair[0]}, data, predictions=kept))
    lacks = []
    for row in data:
        p, q = (log_probs(module, row.tokens)[np.flatnonzero(row.mask[1:])] for module in pair)
        tail = np.argsort(-p, 1)[:, keep:]
        p, q = (np.exp(np.take_along_axis(x, tail, 1)) for x in (p, q))
        lacks.append(
            (p * np.log(p / p.sum(1, keepdims=True) / (q / q.sum(1, keepdims=True)))).sum(1)
        )
    short = exact["quantized"].kl_nats - report["quantized"].kl_nats
    assert short == pytest.approx(np.concatenate(lacks).mean(), rel=1e-3) and short > 0
    assert report["same"].kl_nats == pytest.approx(0, abs=1e-6)
    assert (
        report["quantized"].flips == exact["quantized"].flips
        and f"{keep} likeliest of 97" in report.teacher
    )


def test_the_floor_is_the_distance_to_the_tail_spread_evenly(pair, tmp_path):
    kept = run(teacher_predictions(pair[0], rows(), 8, tmp_path))
    data = rows()
    p = np.concatenate(
        [log_probs(pair[0], row.tokens)[np.flatnonzero(row.mask[1:])] for row in data]
    )
    top = np.argsort(-p, 1)[:, :8]
    rebuilt = np.log(
        (1 - np.exp(np.take_along_axis(p, top, 1)).sum(1, keepdims=True)) / (V - 8)
    ) * np.ones_like(p)
    np.put_along_axis(rebuilt, top, np.take_along_axis(p, top, 1), 1)
    assert kept.floor_nats == pytest.approx((np.exp(p) * (p - rebuilt)).sum(1).mean(), rel=1e-4)
    assert (kept.tokens[:, 0] == p.argmax(1)).all()


def test_kept_predictions_are_read_from_disk_and_made_again_if_broken(pair, tmp_path, monkeypatch):
    first = run(teacher_predictions(pair[0], rows(), 8, tmp_path))
    (file,) = tmp_path.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(teacher, "Predictor", None)  # the model must not run
        again = run(teacher_predictions(pair[0], rows(), 8, tmp_path))
    assert (again.log_probs == first.log_probs).all() and again.description == first.description
    file.write_bytes(file.read_bytes()[:100])
    assert (
        run(teacher_predictions(pair[0], rows(), 8, tmp_path)).log_probs == first.log_probs
    ).all()
    file.write_bytes(b"PK nothing")
    assert (
        run(teacher_predictions(pair[0], rows(), 8, tmp_path)).log_probs == first.log_probs
    ).all()


def test_another_model_and_other_rows_have_files_of_their_own(pair, tmp_path):
    made = [
        run(teacher_predictions(m, r, 8, tmp_path))
        for m, r in ((pair[0], rows()), (pair[1], rows()), (pair[0], rows(5, 1)))
    ]
    assert len(list(tmp_path.iterdir())) == 3 and not (made[0].nll == made[1].nll).all()


def test_only_the_newest_eight_files_stay(pair, tmp_path):
    for n in range(9):
        (tmp_path / f"{n}.npz").write_bytes(b"")
        os.utime(tmp_path / f"{n}.npz", (n, n))
    run(teacher_predictions(pair[0], rows(1), 8, tmp_path))
    assert (
        len(list(tmp_path.iterdir())) == 8
        and not (tmp_path / "1.npz").exists()
        and (tmp_path / "2.npz").exists()
    )


def test_a_cache_that_cannot_be_written_costs_only_time(pair, tmp_path):
    (tmp_path / "file").write_text("")
    assert run(teacher_predictions(pair[0], rows(1), 8, tmp_path / "file")).tokens.shape[1] == 8


def test_broken_weights_are_named(pair):
    module, _ = tiny(torch_dtype="float32", num_hidden_layers=2)

    @on_mlx
    def spoil():
        module.model.norm.weight = module.model.norm.weight * mx.nan

    spoil()
    report = run(judge(pair[0], {"quantized": module}, rows(2)))
    assert "gives no numbers on 2 rows" in report.notes[0]


def test_answers_are_what_the_model_finds_likeliest(pair, monkeypatch):
    monkeypatch.setattr(generate, "_PREFILL", 4)

    @on_mlx
    def plain(prompt: str) -> str:
        tokens, start = Letters().encode(prompt), len(prompt)
        for _ in range(6):
            tokens.append(pair[0](mx.array([tokens]))[0, -1].argmax().item())
            if tokens[-1] == 0:
                return Letters().decode(tokens[start:-1])
        return Letters().decode(tokens[start:])

    prompts = ["a", "hello there, you"]
    report = run(
        judge(pair[0], {"quantized": pair[1]}, tokenizer=Letters(), prompts=prompts, max_tokens=6)
    )
    assert [sample.texts[0] for sample in report.samples] == [plain(p) for p in prompts]
    assert report.rows == 0 and len(report.samples[0].texts) == 2


def test_an_answer_ends_where_the_model_ends_it(pair):
    tokenizer = Letters()
    text = (
        run(judge(pair[0], {}, tokenizer=tokenizer, prompts=["hello"], max_tokens=8))
        .samples[0]
        .texts[0]
    )
    tokenizer.eos_token_ids = frozenset({ord(text[3]) - 33})
    shorter = (
        run(judge(pair[0], {}, tokenizer=tokenizer, prompts=["hello"], max_tokens=8))
        .samples[0]
        .texts[0]
    )
    assert shorter == text[: text.index(text[3])]


def test_a_chat_template_is_used(pair):
    tokenizer = Letters()
    tokenizer.chat_template = "x"
    tokenizer.apply_chat_template = lambda turns, add_generation_prompt: tokenizer.encode(
        f"<{turns[0]['content']}>"
    )
    chat = run(judge(pair[0], {}, tokenizer=tokenizer, prompts=["hello"])).samples[0].texts
    assert (
        chat == run(judge(pair[0], {}, tokenizer=Letters(), prompts=["<hello>"])).samples[0].texts
    )


def test_a_golden_set_is_scored_for_every_model(pair):
    text = run(
        judge(pair[0], {}, tokenizer=Letters(), prompts=["hello", "you"], max_tokens=5)
    ).samples
    golden = [
        {"prompt": "hello", "expected": text[0].texts[0]},
        {"prompt": "you", "completion": "no", "id": 7},
    ]
    report = run(
        judge(pair[0], {"quantized": pair[1]}, tokenizer=Letters(), golden=golden, max_tokens=5)
    )
    assert report["full precision"].golden_score == 0.5 and report[
        "full precision"
    ].golden_se == pytest.approx(0.5 / 2**0.5)
    assert report.samples[0].scores[0] == 1 and report.samples[1].expected == "no"


def test_a_model_that_is_not_in_memory_is_not_asked(pair, tmp_path):
    kept, golden = (
        run(teacher_predictions(pair[0], rows(), 8, tmp_path)),
        [{"prompt": "a", "expected": "b"}],
    )
    report = run(
        judge(
            None,
            {"quantized": pair[1]},
            rows(),
            predictions=kept,
            tokenizer=Letters(),
            golden=golden,
            max_tokens=3,
        )
    )
    assert report.samples[0].texts[0] == "" and np.isnan(report.samples[0].scores[0])
    assert np.isnan(report["full precision"].golden_score) and report["quantized"].golden_score == 0


@pytest.mark.parametrize(
    "match, answer, expected, value",
    [
        ("exact", " Paris\n", "Paris", 1),
        ("exact", "Paris.", "Paris", 0),
        ("contains", "It is Paris.", "Paris", 1),
        ("contains", "paris", "Paris", 0),
        (lambda a, e: len(a) == e, "four", 4, 1),
        (lambda a, e: 0.25, "", "x", 0.25),
    ],
)
def test_answers_are_matched(match, answer, expected, value):
    (question,) = questions([{"prompt": "?", "expected": expected}], match)
    assert score(answer, question, match) == value


GOOD = {"prompt": "a", "expected": "b"}
GOLDEN_FAULTS = {
    "a string": ("golden.jsonl", "exact", "list of rows"),
    "one row": (GOOD, "exact", "list of rows"),
    "no rows at all": (3, "exact", "not int"),
    "row of another kind": ([GOOD, "hello"], "exact", "row 1: it is str"),
    "no prompt": (
        [GOOD, {"question": "a", "expected": "b"}],
        "exact",
        "row 1: no 'prompt'; its keys are 'question', 'expected'",
    ),
    "empty prompt": ([{"prompt": " ", "expected": "b"}], "exact", "row 0: 'prompt' is empty"),
    "prompt of another kind": ([{"prompt": 5, "expected": "b"}], "exact", "'prompt' is int"),
    "no answer": ([GOOD, GOOD, {"prompt": "a"}], "exact", "row 2: no 'expected'"),
    "two answers": ([{**GOOD, "completion": "c"}], "exact", "both 'expected' and 'completion'"),
    "empty answer": ([{"prompt": "a", "expected": ""}], "contains", "'expected' is empty"),
    "answer of another kind": ([{"prompt": "a", "completion": 5}], "exact", "'completion' is int"),
}


@pytest.mark.parametrize("name", GOLDEN_FAULTS)
def test_a_malformed_golden_set_is_refused_with_row_and_key(name):
    golden, match, words = GOLDEN_FAULTS[name]
    with pytest.raises(DataError, match=words):
        questions(golden, match)


def test_all_faults_of_a_golden_set_are_told_at_once():
    with pytest.raises(DataError, match=r"30 of 30 .*row 0.*row 19.*\(and 10 more\)"):
        questions([{"prompt": "a"}] * 30, "exact")


@pytest.mark.parametrize("match", ["exakt", 5, None])
def test_an_unknown_way_to_match_is_refused(match):
    with pytest.raises(ConfigError, match="exact, contains, or a function"):
        questions([GOOD], match)


@pytest.mark.parametrize("answer", [2, -1, float("nan"), "yes", None, [1]])
def test_a_matching_function_must_return_a_share(answer):
    (question,) = questions([GOOD], lambda *_: answer)
    with pytest.raises(DataError, match="row 0"):
        score("x", question, lambda *_: answer)


REFUSED = {
    "no model": (lambda p: judge(None, {}, rows()), "no model"),
    "nothing to judge by": (lambda p: judge(p[0], {}), "nothing to judge by"),
    "a student called full precision": (
        lambda p: judge(None, {"full precision": p[1]}, rows()),
        "as teacher",
    ),
    "prompts without a tokenizer": (lambda p: judge(p[0], {}, prompts=["a"]), "tokenizer"),
    "a prompt that is no text": (
        lambda p: judge(p[0], {}, prompts=[5], tokenizer=Letters()),
        "Prompt 0",
    ),
    "no tokens to write": (
        lambda p: judge(p[0], {}, prompts=["a"], tokenizer=Letters(), max_tokens=0),
        "max_tokens=0",
    ),
    "keep of 0": (lambda p: teacher_predictions(p[0], rows(), 0), "keep=0"),
    "keep of True": (lambda p: teacher_predictions(p[0], rows(), True), "keep=True"),
    "no rows to remember": (lambda p: teacher_predictions(p[0], []), "no rows"),
    "rows without tokens": (lambda p: judge(p[0], {}, ["hello"]), "Row 0 has no tokens"),
    "rows as text": (lambda p: judge(p[0], {}, "hello"), "Row 0 has no tokens"),
    "a mask of another length": (
        lambda p: judge(p[0], {}, [SimpleNamespace(tokens=np.zeros(4, np.int32), mask=np.ones(3))]),
        "Row 0",
    ),
    "no targets": (
        lambda p: judge(
            p[0], {}, [SimpleNamespace(tokens=np.zeros(4, np.int32), mask=np.zeros(4))]
        ),
        "target",
    ),
    "a token that the model has not": (
        lambda p: judge(
            p[0],
            {},
            [*rows(1), SimpleNamespace(tokens=np.array([1, V], np.int32), mask=np.ones(2))],
        ),
        "Row 1 has token 97",
    ),
    "a token below 0": (
        lambda p: teacher_predictions(
            p[0], [SimpleNamespace(tokens=np.array([1, -1], np.int32), mask=np.ones(2))]
        ),
        "token -1",
    ),
    "models of two tokenizers": (
        lambda p: judge(p[0], {"quantized": tiny(vocab_size=64)[0]}, rows()),
        "share a vocabulary",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_judged_is_refused(pair, name):
    work, words = REFUSED[name]
    with pytest.raises((ConfigError, DataError), match=words):
        run(work(pair))


def test_predictions_kept_for_other_rows_are_refused(pair, tmp_path):
    kept = run(teacher_predictions(pair[0], rows(), 8, tmp_path))
    with pytest.raises(ConfigError, match="other rows"):
        run(judge(None, {"quantized": pair[1]}, rows(5, 1), predictions=kept))
    with pytest.raises(ConfigError, match="other rows"):
        run(
            judge(
                None, {"quantized": pair[1]}, prompts=["a"], tokenizer=Letters(), predictions=kept
            )
        )
