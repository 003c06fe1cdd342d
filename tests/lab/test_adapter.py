"""``Adapter``: one state for traits, sliders and code; a base that never changes; nothing lost without a word."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import traitlets as T
from mlx.utils import tree_flatten

import qlab
from qlab.core.config.lora import LoRAConfig
from qlab.engine.io.loaded import Loaded
from qlab.errors import ConfigError
from qlab.errors import LayerNotFoundError
from qlab.errors import LoadError
from qlab.errors import WeightsError
from qlab.lab.model import Model
from tests.tiny import on_mlx, tiny


class Tokenizer:
    """Enough of mlx-lm's wrapper to cut text into tokens."""

    bos_token_id, chat_template = None, None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [byte % 97 for byte in text.encode()]


@pytest.fixture(scope="module")
def model():
    module, _ = tiny("llama tied")
    return Model(Loaded(module=module, tokenizer=Tokenizer(), config={}, name="tiny"))


@pytest.fixture
def q(model):
    made = qlab.Quantizer(model, bits=3, group_size=32)
    yield made
    made.close()


@on_mlx
def logits(module) -> np.ndarray:
    return np.array(module(mx.arange(12)[None]).astype(mx.float32))


@on_mlx
def numbers(module) -> dict[str, bytes]:
    return {path: bytes(memoryview(array)) for path, array in tree_flatten(module.parameters())}


@on_mlx
def changed(parameters: dict) -> dict:
    """Parameters that have an effect."""
    made = {
        path: array + 0.1 * mx.random.normal(array.shape, key=mx.random.key(1))
        for path, array in parameters.items()
    }
    mx.eval(made)
    return made


def test_alpha_and_scale_say_one_thing(model):
    a = qlab.Adapter(model, rank=8, alpha=32)
    assert (a.scale, a.alpha) == (4, 32)
    a.rank = 16
    assert (a.scale, a.alpha) == (4, 64)
    a.alpha = 16
    assert a.scale == 1
    assert qlab.Adapter(model, rank=16, alpha=32, rslora=True).scale == 8
    assert qlab.Adapter(model).scale == 2
    with pytest.raises(ConfigError, match="give one of them"):
        qlab.Adapter(model, alpha=16, scale=2.0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "lore"}, "Did you mean 'lora'"),
        ({"rank": 0}, "rank=0"),
        ({"rank": 65}, "is above the width"),
        ({"rank": 2.5}, "rank=2.5"),
        ({"alpha": 0}, "alpha=0"),
        ({"scale": float("nan")}, "scale=nan"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"num_layers": 4}, "has 3 blocks"),
        ({"init": "qerra"}, "qerra"),
        ({"keys": []}, "keys="),
        ({"keys": 3}, "keys=3"),
        ({"rslora": 1}, "rslora"),
        ({"dtype": "float16"}, "float16"),
        ({"init": "qera"}, "is not quantized"),
    ],
)
def test_bad_settings_are_refused(model, settings, words):
    with pytest.raises(ConfigError, match=words):
        qlab.Adapter(model, **settings)


def test_a_source_that_is_no_model_and_a_key_of_no_layer_are_refused(model):
    with pytest.raises(ConfigError, match="give a model or a Quantizer"):
        qlab.Adapter("demo")
    with pytest.raises(LayerNotFoundError, match="Did you mean 'q_proj'"):
        qlab.Adapter(model, keys=["q_porj"])


def test_a_trait_that_is_refused_leaves_the_state_as_it_was(model):
    a = qlab.Adapter(model, rank=8)
    before = a.config
    for name, value in {
        "rank": 100,
        "kind": "x",
        "keys": ("nothing",),
        "num_layers": 9,
        "dropout": 2.0,
        "init": "qera",
    }.items():
        with pytest.raises((ConfigError, LayerNotFoundError)):
            setattr(a, name, value)
        assert a.config == before
    with pytest.raises(T.TraitError):
        a.rank = "8"


def test_code_and_config_rebuild_the_adapter(model, q):
    a = qlab.Adapter(
        q,
        rank=4,
        scale=1.5,
        kind="dora",
        keys=["q_proj", "embed_tokens"],
        num_layers=2,
        init="residual",
        dropout=0.1,
    )
    made = {"qlab": qlab, "q": q}
    exec(a.code, made)
    assert made["a"].config == a.config == eval(repr(a.config), {"LoRAConfig": LoRAConfig})
    assert qlab.Adapter(model).code == "a = qlab.Adapter(model, rank=8)"


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_base_stays_bit_identical_whatever_is_done_to_the_adapter(q, kind):
    a = qlab.Adapter(q, kind=kind, rank=4, keys=("all-linear", "embed_tokens"))
    base, before, plain = a.base, numbers(a.base.module), logits(a.base.module)
    assert np.array_equal(logits(a.module), plain) and not a.trained
    a.set_parameters(changed(a.parameters), "a test")
    assert a.trained and np.abs(logits(a.module) - plain).max() > 0.01
    with a.disabled():
        assert np.array_equal(logits(a.module), plain)
    with pytest.raises(RuntimeError, match="mine"), a.disabled():
        raise RuntimeError("mine")
    assert np.abs(logits(a.module) - plain).max() > 0.01
    assert a.base is base and numbers(base.module) == before
    assert qlab.Adapter(base, kind=kind).module is not a.module and numbers(base.module) == before
    assert a.remove() is base and not a.trained and numbers(base.module) == before


def test_what_would_lose_trained_parameters_is_refused_until_reset(q):
    a = qlab.Adapter(q, rank=4)
    a.set_parameters(changed(a.parameters), "run 1, step 200")
    held = a.parameters
    for name, value in {
        "rank": 8,
        "kind": "dora",
        "keys": ("q_proj",),
        "num_layers": 1,
        "init": "residual",
    }.items():
        with pytest.raises(ConfigError, match=r"run 1, step 200.*reset\(\)"):
            setattr(a, name, value)
    assert a.parameters.keys() == held.keys() and all(
        a.parameters[path] is held[path] for path in held
    )
    a.scale, a.dropout = 1.0, 0.1
    assert all(a.parameters[path] is held[path] for path in held)
    a.reset()
    a.rank = 8
    assert not a.trained and next(iter(a.parameters.values())).shape[-1] == 8


def test_parameters_of_another_adapter_are_refused_whole(q):
    a = qlab.Adapter(q, rank=4, keys=["q_proj"])
    good = a.parameters
    first = next(iter(good))
    wrong = [
        ({k: v for k, v in good.items() if k != first}, "is missing"),
        ({**good, "x.lora_a": good[first]}, "belongs to no adapter"),
        (
            {**good, first: qlab.Adapter(q, rank=2, keys=["q_proj"]).parameters[first]},
            r"has shape \(64, 2\), not \(64, 4\)",
        ),
    ]
    for parameters, words in wrong:
        with pytest.raises(ConfigError, match=words):
            a.set_parameters(parameters, "x")

    @on_mlx
    def broken() -> dict:
        made = {**good, first: good[first] * float("nan")}
        mx.eval(made)
        return made

    with pytest.raises(WeightsError, match="NaN"):
        a.set_parameters(broken(), "x")
    assert (
        not a.trained and a.version == 0 and all(a.parameters[path] is good[path] for path in good)
    )


def test_fresh_parameters_depend_on_the_seed_alone(model):
    one, two, three = (qlab.Adapter(model, rank=4, seed=seed).parameters for seed in (0, 0, 1))
    same = [np.array_equal(np.array(one[path]), np.array(two[path])) for path in one]
    assert all(same)
    assert any(not np.array_equal(np.array(one[path]), np.array(three[path])) for path in one)


def test_the_base_follows_the_quantizer_until_the_adapter_is_trained(q):
    a = qlab.Adapter(q, rank=4)
    first = a.base
    assert a.base is first and a.plan.default.bits == 3
    q.bits = 4
    assert a.base is not first and a.plan.default.bits == 4
    a.set_parameters(changed(a.parameters), "x")
    pinned = a.base
    q.bits = 8
    q.set("model.layers.0.mlp.up_proj", bits=2)
    assert a.base is pinned and a.plan.default.bits == 4
    a.reset()
    assert a.base is not pinned and a.plan.default.bits == 8


def test_starts_follow_the_storage_and_bring_the_model_nearer_to_the_original(model, q):
    text = "the quick brown fox jumps over the lazy dog. " * 80
    q.bits = 2
    a = qlab.Adapter(q, rank=8, init="qera", text=text)
    plain, original = logits(a.base.module), logits(model.module)
    first = a.parameters
    distance = np.square(logits(a.module) - original).sum() / np.square(plain - original).sum()
    assert distance < 0.9
    assert a.original is model
    q.bits = 4
    assert not np.array_equal(
        np.array(a.parameters[next(iter(first))]), np.array(first[next(iter(first))])
    )


def test_a_model_that_came_quantized_has_no_original_to_start_from(q):
    small = q.quantize()
    a = qlab.Adapter(small, rank=4)
    assert a.original is None and a.base is small
    with pytest.raises(ConfigError, match="original weights are not known"):
        a.init = "residual"
    with pytest.raises(ConfigError, match="original weights are not known"):
        a.measure()


def test_report_has_a_row_per_layer_and_its_sums_are_those_of_the_config(q):
    a = qlab.Adapter(q, rank=4, keys=["q_proj", "embed_tokens"])
    report = a.measure(text=False)
    assert report.size == a.config.size(a.model.spec) == sum(x.size for x in report.layers)
    assert report.nbytes == 4 * report.size and report.share == report.size / a.model.spec.size
    frame = report.to_pandas()
    assert (
        len(frame) == 4
        and frame.recovered.between(0.01, 1).all()
        and frame.recovered_output.isna().all()
    )
    a.rank = 16
    assert all(
        x.recovered > y.recovered for x, y in zip(a.report.layers, report.layers, strict=True)
    )


def test_sliders_traits_and_errors_are_one_state(q):
    a = qlab.Adapter(q, rank=4)
    view = a.widget
    settings = {
        "kind": "dora",
        "rank": 8,
        "scale": 1,
        "dropout": 0,
        "num_layers": 2,
        "init": "default",
        "rslora": False,
        "keys": ["q_proj"],
    }
    controls = a._panel._controls
    controls.intent = {"op": "set", "seq": 1, "config": settings}
    assert (a.kind, a.rank, a.keys, a.num_layers) == ("dora", 8, ("q_proj",), 2) and view.state[
        "ack"
    ] == 1
    a.rank = 2
    assert view.state["rank"] == 2
    before = a.config
    bad = [
        {**settings, "rank": 4096},
        {**settings, "rank": "8"},
        {**settings, "keys": ["nothing"]},
        {"colour": 3},
        {**settings, "scale": 0},
    ]
    for seq, config in enumerate(bad, 2):
        controls.intent = {"op": "set", "seq": seq, "config": config}
        assert view.state["error"] and view.state["ack"] == seq and a.config == before
    a.close()


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("format", ["mlx", "peft"])
def test_a_saved_adapter_comes_back_whole(q, tmp_path, kind, format):
    a = qlab.Adapter(q, kind=kind, rank=4, scale=1.5, keys=["q_proj", "up_proj"], num_layers=2)
    a.set_parameters(changed(a.parameters), "x")
    a.save(tmp_path / "a", format=format)
    b = qlab.Adapter.load(tmp_path / "a", q)
    assert b.trained and (b.kind, b.rank, b.alpha) == (kind, 4, 6.0)
    assert np.allclose(logits(b.module), logits(a.module), atol=1e-5)
    with pytest.raises(ConfigError, match=r"reset\(\)"):
        b.rank = 8


def test_a_saved_adapter_of_a_base_quantized_here_says_how_to_get_what_was_trained(
    demo, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    q = qlab.Quantizer(demo, bits=3)
    q.set("model.embed_tokens", None)
    q.set("*.0.mlp.down_proj", 4)
    a = qlab.Adapter(q, rank=4, num_layers=1)
    a.set_parameters(changed(a.parameters), "x")
    note, trained_on = a.save("a"), "affine 3-bit g64 (2 layers otherwise) of 'demo'"
    assert (
        f"trained on {trained_on}, which is in no folder yet: a.base.save('base') writes it" in note
    )
    assert f"trained on {trained_on}; a.fuse(rest=16)" in a.save("peft", format="peft")
    for name in ("a", "peft"):
        assert qlab.Adapter.load(name, q).notes == (f"It was trained on {trained_on}.",)
    text = Path("a/README.md").read_text()
    assert note in text
    exec(text.split("```python")[1].split("```")[0], {})
    assert numbers(qlab.load("base").module) == numbers(a.base.module)
    here = str(tmp_path / "base")
    assert (
        qlab.Adapter(qlab.load("base"))
        .save("b")
        .startswith(f"Saved in mlx-lm's layout; mlx_lm.load({here!r}, adapter")
    )
    assert not Path("b/README.md").exists()
    q.close()


def test_fusing_at_16_bits_gives_the_adapted_model_and_leaves_the_base(model, q):
    a = qlab.Adapter(q, rank=4)
    a.set_parameters(changed(a.parameters), "x")
    before = numbers(a.base.module)
    fused = a.fuse()
    assert (
        np.allclose(logits(fused.module), logits(a.module), atol=1e-3)
        and numbers(a.base.module) == before
    )
    assert not np.allclose(logits(a.fuse(onto="original").module), logits(fused.module), atol=1e-3)
    assert a.preview().retained("16") > a.preview().retained("base")
    with pytest.raises(ConfigError, match="onto="):
        a.fuse(onto="nothing")
    with pytest.raises(ConfigError, match="bits="):
        a.fuse(bits=5)


def test_an_override_of_the_quantizer_counts_too(q):
    a = qlab.Adapter(q, rank=4)
    first = a.base
    q.set("model.layers.0.mlp.up_proj", bits=8)
    assert a.base is not first


def test_a_fused_model_is_no_quantized_one(demo):
    q = qlab.Quantizer(demo, bits=4)
    fused = qlab.Adapter(q, rank=4, num_layers=1, keys=["q_proj"]).fuse(rest=16)
    assert fused.plan is None and fused.original is fused and "4-bit" not in repr(fused)
    q.close()


def test_a_model_that_was_given_back_says_so():
    model = qlab.load("demo")
    q, a = qlab.Quantizer(model), qlab.Adapter(model, rank=2)
    model.free()
    for ask in (
        lambda: a.base.module,
        lambda: model.generate("It"),
        q.quantize,
        lambda: qlab.estimate(model),
    ):
        with pytest.raises(LoadError, match="'demo' was given back by free..; load it again"):
            ask()


def test_settings_by_position_still_work_with_a_warning(model):
    with pytest.warns(DeprecationWarning, match=r"Adapter\(…\).*use kind=…, rank=…"):
        a = qlab.Adapter(model, "dora", 4)
    assert (a.kind, a.rank) == ("dora", 4)
    a.close()
