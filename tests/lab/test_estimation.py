"""What a user asks ``qlab.estimate``: from any source, at any level, with verdict, inverse, changes and advice."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import nbformat
import pytest
from mlx.utils import tree_flatten

import qlab
from qlab import registry
from qlab.core.graph.simulate import Runahead
from qlab.core.machine import budget
from qlab.core.panels.estimate import Choice
from qlab.core.memory.setup import Setup
from qlab.core.config.train import TrainConfig
from qlab.engine.quantize.quantize import quantize
from qlab.engine.memory.forecast import Forecast
from qlab.nn.frozen import usual_compute
from qlab.runtime.job import mlx_call
from qlab.engine.step.whole import WholeGraphStep
from qlab.engine.adapt.attach import attach
from qlab.engine.step.blockwise import WINDOWS
from qlab.engine.io.config_file import structure
from qlab.engine.train.update import Update
from qlab.errors import ConfigError
from qlab.errors import LayerNotFoundError
from qlab.errors import LoadError
from qlab.errors import UnsupportedError
from qlab.lab.estimation import with_largest_window
from tests.tiny import CONFIG, on_mlx, quantized, tiny

SMALL = {**CONFIG, "num_hidden_layers": 6, "max_position_embeddings": 512}
Q, L, T, P = qlab.QuantConfig, qlab.LoRAConfig, qlab.TrainConfig, qlab.QuantPlan
SHORT = T(max_seq_length=64)
STORAGES = [
    Q(s.name, b, g)
    for s in registry.shelf("schemes").values()
    for b in s.bits
    for g in s.group_sizes
]


@pytest.fixture(scope="module", autouse=True)
def no_record(tmp_path_factory):
    """Bands as on a machine that has measured nothing yet."""
    folder = tmp_path_factory.mktemp("record")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qlab.runtime.peaks.cache_folder", lambda: folder)
        yield folder


@pytest.fixture(scope="module")
def est():
    return qlab.estimate(SMALL, Q(), train=SHORT)


# --- sources ---------------------------------------------------------------------------------------------------------


def test_a_dict_a_file_and_a_folder_say_the_same(est, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    for source in (tmp_path, tmp_path / "config.json", str(tmp_path)):
        found = qlab.estimate(source, Q(), train=SHORT)
        assert found.parts == est.parts and found.spec.name == tmp_path.name


def test_a_loaded_model_needs_what_its_config_says(demo):
    assert qlab.estimate(demo, Q()).parts == qlab.estimate("demo", Q()).parts


def test_a_quantizer_brings_its_plan(demo):
    q = qlab.Quantizer(demo, bits=3)
    q.close()
    q.set("model.layers.0.mlp.down_proj", bits=8)
    assert qlab.estimate(q).setup.plan == q.plan
    assert qlab.estimate(q, Q(bits=8)).setup.plan == P(Q(bits=8))


def test_an_adapter_brings_its_config(demo):
    a = qlab.Adapter(demo, rank=4, num_layers=2)
    assert qlab.estimate(a).setup.adapter == a.config
    assert qlab.estimate(a, adapter=L(rank=16)).setup.adapter.rank == 16
    a.close()


def test_lists_make_a_table_of_all_combinations():
    table = qlab.estimate(SMALL, [None, Q()], [L(rank=4), L(rank=8)], SHORT)
    assert [(x.setup.label, x.setup.adapter.rank) for x in table] == [
        ("as stored", 4),
        ("as stored", 8),
        ("affine 4-bit g64", 4),
        ("affine 4-bit g64", 8),
    ]
    assert (
        len(table.to_pandas()) == 4
        and "<table" in table._repr_html_()
        and "affine 4-bit g64" in repr(table)
    )


# --- exact parts -----------------------------------------------------------------------------------------------------


def test_parts_sum_and_lie_within_the_band(est):
    with pytest.deprecated_call():
        expected = est.expected_nbytes
    assert est.total_nbytes == sum(est.parts.values()) == expected
    assert est.exact_nbytes <= est.low_nbytes <= est.total_nbytes <= est.high_nbytes
    assert all(n >= 0 for n in est.parts.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@on_mlx
def test_bytes_of_weights_are_those_really_stored_for_every_scheme(dtype):
    module, spec = tiny(torch_dtype=dtype)
    forecast = Forecast(module, "tiny")
    for config in (None, *STORAGES):
        real = sum(a.nbytes for _, a in tree_flatten(quantized(module, spec, config).parameters()))
        assert forecast.inputs(Setup(P(config) if config else None))["weights"] == real, config


@pytest.mark.parametrize("own", [None, Q("nf4_dq"), Q(bits=8, group_size=32), Q("mxfp8")], ids=str)
@on_mlx
def test_bytes_of_mixed_precision_are_those_really_stored(own):
    module, spec = tiny("llama tied", torch_dtype="bfloat16")
    plan = P(Q(bits=3), {"model.layers.1.mlp.down_proj": own, "model.embed_tokens": own})
    work = quantize(module, spec, plan, "rtn", {})
    try:
        while True:
            next(work)
    except StopIteration as end:
        real = sum(a.nbytes for _, a in tree_flatten(end.value.parameters()))
    assert Forecast(module, "tiny").inputs(Setup(plan))["weights"] == real


@pytest.mark.parametrize("kind", registry.shelf("adapters"))
@pytest.mark.parametrize("name", registry.shelf("optimizers"))
@on_mlx
def test_bytes_of_adapter_and_optimizer_are_those_really_kept(name, kind):
    module, spec = tiny()
    lora, train = L(rank=4, num_layers=2, kind=kind), T(optimizer=name)
    step = WholeGraphStep(attach(module, spec, lora, usual_compute(), False), train)
    state = Update(train, step.parameters).state
    found = Forecast(module, "tiny").inputs(Setup(None, lora, train))
    assert found["adapter"] == sum(a.nbytes for a in step.parameters.values())
    kept = sum(
        a.nbytes
        for path, a in state.items()
        if path.split(".")[-1] not in ("step", "learning_rate")
    )
    assert found["optimizer"] == kept > 0


def test_what_takes_no_memory_changes_no_estimate(est):
    other = T(
        max_seq_length=64,
        iters=7,
        epochs=2.0,
        learning_rate=1.0,
        lr_schedule="cosine",
        warmup=3,
        weight_decay=0.1,
        mask_prompt=False,
        steps_per_eval=5,
        val_batches=1,
        early_stop=2,
        steps_per_save=9,
        on_nonfinite="stop",
        seed=5,
    )
    assert (
        est.at(Setup(est.setup.plan, L(scale=9.0, rslora=True, init="residual"), other)).parts
        == est.parts
    )


def test_the_published_table_of_weights_is_what_the_forecast_says():
    root = Path(__file__).parents[2]
    cells = nbformat.read(root / "notebooks" / "02_estimate.ipynb", as_version=4).cells
    space: dict = {}
    for cell in cells:
        if cell.cell_type == "code" and re.match("shapes = |def llama|import qlab", cell.source):
            exec(cell.source.split("\nest = ")[0], space)
    text = (root / "docs" / "guide" / "figures.md").read_text()
    for config in space["shapes"]:
        outside = {"model.embed_tokens": None} | (
            {} if config["tie_word_embeddings"] else {"lm_head": None}
        )
        plans = [None, P(Q("nf4"), outside), P(Q("nf4_dq"), outside), P(Q()), P(Q(group_size=128))]
        forecast = mlx_call(lambda c=config: Forecast(structure(c)[0], "x"))
        row = [forecast.spec.size, *(forecast.inputs(Setup(plan))["weights"] for plan in plans)]
        assert (
            f"| {config['_name_or_path']} | " + " | ".join(f"{n / 1e9:.2f}" for n in row) + " |"
            in text
        )


# --- verdict and inverse ---------------------------------------------------------------------------------------------


def test_fits_tight_and_not_follow_the_band(est):
    words = [
        est.verdict(n).word
        for n in (est.high_nbytes, est.high_nbytes - 1, est.total_nbytes, est.total_nbytes - 1)
    ]
    assert words == ["fits", "tight", "tight", "does not fit"]
    assert [est.fits(n) for n in (est.total_nbytes, est.total_nbytes - 1)] == [True, False]
    assert (
        est.verdict(10 * est.high_nbytes).margin_nbytes == 10 * est.high_nbytes - est.total_nbytes
    )


def test_a_named_budget_is_what_such_a_machine_gives():
    assert budget("16 GB Mac").free_nbytes == pytest.approx(16 * 2**30 * 2 / 3, abs=1)
    assert budget("64 GB Mac").free_nbytes == 48 * 2**30
    assert budget("24 GB card").free_nbytes < 24 * 2**30
    assert budget("10 GB").free_nbytes == 10e9 and budget(5).free_nbytes == 5


def test_a_verdict_names_the_largest_part_and_whether_others_are_in_the_way(est):
    busy = replace(budget(est.total_nbytes // 2), total_nbytes=2 * est.total_nbytes)
    assert est.largest in est.verdict(busy).reason and "other programs" in est.verdict(busy).reason


@pytest.mark.parametrize("name", ["max_seq_length", "batch_size", "rank", "num_layers"])
def test_the_solved_value_fits_and_the_next_does_not(est, name):
    place = round(
        0.8
        * est.at(
            est.setup.with_value(name, {"rank": 32, "num_layers": 6}.get(name, 200))
        ).total_nbytes
    )
    value = est.solve(name, place)
    assert est.at(est.setup.with_value(name, value)).fits(place)
    assert not est.at(est.setup.with_value(name, value + 1)).fits(place)


def test_solved_bits_are_the_most_that_fit(est):
    needs = {bits: est.at(est.setup.with_value("bits", bits)).total_nbytes for bits in (1, 8)}
    assert est.solve("bits", max(needs.values()) * 2) == 8
    with pytest.raises(ConfigError, match="Not even bits=1 fits"):
        est.solve("bits", needs[1] - 1)


def test_a_solved_rank_keeps_alpha(est):
    for lora in (L(rank=8, scale=2.0), L(rank=4, scale=3.0, rslora=True)):
        assert Setup(None, lora).with_value("rank", 16).adapter.alpha == pytest.approx(lora.alpha)


def test_changes_fit_and_the_least_cost_comes_first(est):
    place = round(0.7 * est.total_nbytes)
    found = est.changes(place)
    assert found and all(est.at(change.setup).fits(place) for change in found)
    costs = [("none", "small", "some", "large").index(change.quality) for change in found]
    assert costs == sorted(costs) and costs[0] == 0
    assert est.changes(10 * est.total_nbytes) == ()


def test_advice_goes_from_16_bits_to_fewer_to_a_smaller_model():
    wide = {
        **SMALL,
        "num_hidden_layers": 40,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "head_dim": 128,
        "torch_dtype": "bfloat16",
    }
    large = qlab.estimate(wide, train=T(max_seq_length=16))
    ample, narrow, none = (
        large.advise(1e12),
        large.advise(large.parts["weights"]),
        large.advise(1e6),
    )
    assert ample.choice == "LoRA on 16-bit weights" and ample.estimate.fits(1e12)
    assert narrow.choice == "QLoRA" and narrow.estimate.setup.plan
    assert none.choice == "a smaller model" and none.estimate is None and none.code == ""
    assert (
        "qlab.TrainConfig(" in narrow.code
        and "QLoRA" in repr(narrow)
        and "<pre>" in narrow._repr_html_()
    )


def test_the_old_name_of_asking_for_another_setup_warns(est):
    with pytest.deprecated_call(match=r"use at\(setup\)"):
        assert est.again(est.setup).parts == est.parts


# --- levels ----------------------------------------------------------------------------------------------------------


def test_the_levels_agree_and_say_what_they_are(demo, no_record):
    train = T(batch_size=2, max_seq_length=128)
    formula, traced, measured = (
        qlab.estimate(demo, Q(), train=train, level=x) for x in ("formula", "traced", "measured")
    )
    assert [x.level for x in (formula, traced, measured)] == ["formula", "traced", "measured"]
    assert measured.measured_peak == measured.total_nbytes == measured.high_nbytes
    assert traced.total_nbytes == pytest.approx(measured.total_nbytes, rel=0.1)
    assert formula.total_nbytes == pytest.approx(measured.total_nbytes, rel=0.15)
    assert (no_record / "memory.jsonl").read_text().count("\n") == 1


def test_the_code_makes_the_same_setup_again():
    plan = P(
        Q("nf4"), {"model.layers.0.mlp.up_proj": None, "model.layers.1.mlp.up_proj": Q(bits=8)}
    )
    first = qlab.estimate(
        SMALL,
        plan,
        L(rank=4, keys=("q_proj", "v_proj"), dropout=0.1),
        T(max_seq_length=32, optimizer="lion", iters=9),
    )
    space = {"qlab": qlab, "model": SMALL}
    exec(first.code, space)
    assert space["est"].setup == first.setup


# --- the panel's state -----------------------------------------------------------------------------------------------


def waited(panel, until, limit_s: float = 120.0):
    start = time.monotonic()
    while not until() and time.monotonic() - start < limit_s:
        time.sleep(0.02)
    assert until()


def test_quantizer_and_sliders_are_one_state_while_a_view_is_open(demo):
    q = qlab.Quantizer(demo)
    q.close()
    panel = qlab.estimate(q, train=SHORT).panel
    panel._on_intent({"op": "hello", "seq": 1})
    q.bits = 3
    q.set("model.layers.0.mlp.down_proj", bits=8)
    assert panel.setup.plan == q.plan and panel.setup.label == "affine 3-bit g64 + 1 own"
    panel._on_intent(
        {
            "op": "set",
            "seq": 2,
            "choice": replace(panel.state().choice, mode="nf4", bits=4, group_size=64),
        }
    )
    assert (q.mode, q.bits, len(q.plan.overrides)) == ("nf4", 4, 1)
    q.unset()
    assert panel.setup.plan == q.plan == P(Q("nf4"))
    panel._on_intent({"op": "bye", "seq": 3})
    q.mode = "mxfp4"
    assert panel.setup.plan == P(Q("nf4"))  # no view is open
    panel._on_intent({"op": "hello", "seq": 4})
    assert panel.setup.plan == q.plan
    panel.close()


def test_adapter_and_sliders_are_one_state_while_a_view_is_open(demo):
    a = qlab.Adapter(demo)
    panel = qlab.estimate(a, train=SHORT).panel
    panel._on_intent({"op": "hello", "seq": 1})
    a.rank = 16
    assert panel.setup.adapter.rank == 16
    panel._on_intent(
        {"op": "set", "seq": 2, "choice": replace(panel.state().choice, rank=4, num_layers=2)}
    )
    assert (a.rank, a.num_layers, a.alpha) == (4, 2, 32.0)
    panel.close()
    a.close()


def test_an_adapter_on_a_quantizer_brings_its_sliders_along_until_it_is_trained(demo):
    q = qlab.Quantizer(demo)
    q.close()
    a = qlab.Adapter(q, rank=4)
    panel = qlab.estimate(a, train=SHORT).panel
    panel._on_intent({"op": "hello", "seq": 1})
    q.bits = 3
    q.set("model.layers.0.mlp.down_proj", bits=8)
    a.rank = 8
    assert panel.setup.plan == q.plan == a.plan and panel.setup.adapter == a.config
    panel._on_intent(
        {
            "op": "set",
            "seq": 2,
            "choice": replace(panel.state().choice, mode="nf4", bits=4, group_size=64),
        }
    )
    assert (q.mode, q.bits) == ("nf4", 4) and panel.estimate.setup.plan == a.plan
    base = a.plan
    a.set_parameters(a.parameters, "a run")
    q.mode = "mxfp4"
    assert a.quantizer is None and panel.setup.plan == a.plan == base
    panel._on_intent(
        {
            "op": "set",
            "seq": 3,
            "choice": replace(panel.state().choice, mode="affine", bits=8, group_size=64),
        }
    )
    assert q.mode == "mxfp4" and panel.setup.plan.default == Q(bits=8)  # looked at, not moved
    panel.close()
    a.close()


def test_the_trace_follows_a_change_and_a_budget_brings_what_would_make_it_fit():
    panel = qlab.estimate(SMALL, Q(), train=SHORT).panel
    panel._on_intent({"op": "hello", "seq": 1})
    panel._on_intent({"op": "set", "seq": 2, "choice": replace(panel.state().choice, batch_size=2)})
    waited(panel, lambda: panel.state().estimate and panel.state().estimate.level == "traced")
    assert panel.estimate.setup.train.batch_size == 2
    panel._on_intent(
        {"op": "budget", "seq": 3, "name": f"{panel.estimate.total_nbytes * 0.8 / 1e6:.3f} MB"}
    )
    waited(panel, lambda: panel.state().changes)
    assert panel.estimate.verdict().word == "does not fit"
    offered = panel.state().changes[0].setup
    panel._on_intent({"op": "set", "seq": 4, "choice": Choice.of(offered, panel.state().blocks)})
    assert panel.setup == offered and panel.estimate.verdict().word != "does not fit"
    place = panel.estimate.machine
    with pytest.raises(ConfigError, match="'much' is not legal"):  # LivePanel shows it
        panel._on_intent({"op": "budget", "seq": 5, "name": "much"})
    assert panel.estimate.machine == place
    panel._on_intent({"op": "budget", "seq": 6, "name": "16 GB Mac"})
    assert not panel.state().error and panel.estimate.machine.label == "16 GB Mac"
    panel.close()


def test_a_choice_that_the_model_cannot_be_is_told_and_the_panel_goes_on():
    panel = qlab.estimate(SMALL, Q(), train=SHORT).panel
    panel._on_intent({"op": "set", "seq": 1, "choice": replace(panel.state().choice, rank=100)})
    waited(panel, lambda: panel.state().error)
    assert "above the width" in panel.state().error and panel.state().estimate is None
    panel._on_intent({"op": "set", "seq": 2, "choice": replace(panel.state().choice, rank=8)})
    waited(panel, lambda: panel.state().estimate is not None)
    assert not panel.state().error
    panel.close()


# --- bad input -------------------------------------------------------------------------------------------------------


def without(name: str) -> dict:
    return {k: v for k, v in SMALL.items() if k != name}


BAD = [
    ("no model_type", lambda e: qlab.estimate(without("model_type")), LoadError, "no model_type"),
    ("an empty config", lambda e: qlab.estimate({}), LoadError, "no model_type"),
    (
        "an unknown model_type",
        lambda e: qlab.estimate({**SMALL, "model_type": "lama"}),
        LoadError,
        "Did you mean 'llama'",
    ),
    *(
        (f"no {n}", lambda e, n=n: qlab.estimate(without(n)), ConfigError, f"has no {n}")
        for n in (
            "hidden_size",
            "num_hidden_layers",
            "vocab_size",
            "num_attention_heads",
            "intermediate_size",
        )
    ),
    (
        "a width of none",
        lambda e: qlab.estimate({**SMALL, "hidden_size": None}),
        ConfigError,
        "has no hidden_size",
    ),
    (
        "a negative width",
        lambda e: qlab.estimate({**SMALL, "hidden_size": -64}),
        ConfigError,
        "hidden_size=-64",
    ),
    (
        "a width in words",
        lambda e: qlab.estimate({**SMALL, "hidden_size": "64"}),
        ConfigError,
        "hidden_size='64'",
    ),
    (
        "half a width",
        lambda e: qlab.estimate({**SMALL, "hidden_size": 64.5}),
        ConfigError,
        "whole number",
    ),
    (
        "no layers",
        lambda e: qlab.estimate({**SMALL, "num_hidden_layers": 0}),
        ConfigError,
        "num_hidden_layers=0",
    ),
    (
        "a negative context",
        lambda e: qlab.estimate({**SMALL, "max_position_embeddings": -1}),
        ConfigError,
        "max_position_embeddings=-1",
    ),
    (
        "heads that cannot share",
        lambda e: qlab.estimate({**SMALL, "num_key_value_heads": 3}),
        ConfigError,
        "contradicts itself",
    ),
    (
        "heads that do not divide",
        lambda e: qlab.estimate(
            {**without("head_dim"), "num_attention_heads": 5, "num_key_value_heads": 5}
        ),
        ConfigError,
        "contradicts itself",
    ),
    (
        "bits that nobody stores",
        lambda e: qlab.estimate({**SMALL, "quantization": {"bits": 7, "group_size": 64}}),
        ConfigError,
        "nearest is 6",
    ),
    (
        "groups that nobody stores",
        lambda e: qlab.estimate({**SMALL, "quantization": {"bits": 4, "group_size": 48}}),
        ConfigError,
        "group_size=48",
    ),
    (
        "quantization without groups",
        lambda e: qlab.estimate({**SMALL, "quantization": {"bits": 4}}),
        ConfigError,
        "no group_size",
    ),
    (
        "quantization in words",
        lambda e: qlab.estimate({**SMALL, "quantization": "4bit"}),
        ConfigError,
        "block of settings",
    ),
    (
        "a text_config in words",
        lambda e: qlab.estimate({**SMALL, "text_config": "x"}),
        ConfigError,
        "block of settings",
    ),
    ("no such path", lambda e: qlab.estimate("./nowhere"), LoadError, "no config at"),
    ("no hub id", lambda e: qlab.estimate("llama"), LoadError, "hub id"),
    ("a number for a model", lambda e: qlab.estimate(3), ConfigError, "model=3"),
    ("nothing for a model", lambda e: qlab.estimate(None), ConfigError, "model=None"),
    ("no models", lambda e: qlab.estimate([]), ConfigError, "at least one"),
    (
        "a bad one among models",
        lambda e: qlab.estimate([SMALL, 3], train=SHORT),
        ConfigError,
        "model=3",
    ),
    ("quant in words", lambda e: qlab.estimate(SMALL, "4bit"), ConfigError, "quant='4bit'"),
    (
        "adapter in words",
        lambda e: qlab.estimate(SMALL, adapter="lora"),
        ConfigError,
        "adapter='lora'",
    ),
    (
        "a run as a dict",
        lambda e: qlab.estimate(SMALL, train={"iters": 3}),
        ConfigError,
        "TrainConfig",
    ),
    (
        "an unknown level",
        lambda e: qlab.estimate(SMALL, level="formul"),
        ConfigError,
        "Did you mean 'formula'",
    ),
    (
        "a real step of no model",
        lambda e: qlab.estimate(SMALL, level="measured"),
        ConfigError,
        "load the model first",
    ),
    (
        "a rank above the width",
        lambda e: qlab.estimate(SMALL, adapter=L(rank=65)),
        ConfigError,
        "largest is 64",
    ),
    (
        "more layers than there are",
        lambda e: qlab.estimate(SMALL, adapter=L(num_layers=7)),
        ConfigError,
        "has 6 blocks",
    ),
    (
        "a key of no layer",
        lambda e: qlab.estimate(SMALL, adapter=L(keys=["q_prj"])),
        LayerNotFoundError,
        "Did you mean 'q_proj'",
    ),
    (
        "an override of no layer",
        lambda e: qlab.estimate(SMALL, P(Q(), {"model.layers.0.mlp.up": None})),
        LayerNotFoundError,
        "Did you mean",
    ),
    (
        "more than an array holds",
        lambda e: qlab.estimate({**SMALL, "hidden_size": 10**12}),
        ConfigError,
        "from 1 to 2147483647",
    ),
    (
        "a model that cannot run",
        lambda e: qlab.estimate({**SMALL, "head_dim": 7}, train=SHORT),
        UnsupportedError,
        "cannot be built: .*dims must be even",
    ),
    (
        "an override that does not divide",
        lambda e: qlab.estimate(
            {**SMALL, "hidden_size": 96},
            P(Q(group_size=32), {"model.layers.0.mlp.up_proj": Q(group_size=64)}),
        ),
        ConfigError,
        "'model.layers.0.mlp.up_proj' .* nearest group size that does is 32",
    ),
    (
        "a storage that holds no layer",
        lambda e: qlab.estimate(
            {**SMALL, "hidden_size": 48, "intermediate_size": 80, "head_dim": 12},
            Q("affine", 4, 128),
        ),
        ConfigError,
        "No layer .* not a multiple",
    ),
    (
        "rows beyond the context",
        lambda e: qlab.estimate(SMALL, train=T(max_seq_length=513)),
        ConfigError,
        "largest is 512",
    ),
    ("an unknown machine", lambda e: qlab.estimate(SMALL, machine="big"), ConfigError, "16 GB Mac"),
    *(
        (f"a budget of {n!r}", lambda e, n=n: e.fits(n), ConfigError, "not legal")
        for n in (0, -5, float("nan"), float("inf"), True, [1], "0 GB Mac", "16 GB toaster")
    ),
    (
        "solving for what there is not",
        lambda e: e.solve("batchsize"),
        ConfigError,
        "Did you mean 'batch_size'",
    ),
    (
        "solving where nothing fits",
        lambda e: e.solve("rank", 10),
        ConfigError,
        "Not even rank=1 fits",
    ),
]


@pytest.mark.parametrize(
    ("ask", "kind", "words"), [row[1:] for row in BAD], ids=[row[0] for row in BAD]
)
def test_bad_input_is_refused_with_a_reason(est, ask, kind, words):
    with pytest.raises(kind, match=words):
        ask(est)


@pytest.mark.parametrize(
    ("text", "words"), [("{nope", "not JSON"), ("[1]", "no settings"), ("", "not JSON")]
)
def test_a_file_that_is_no_config_is_refused(text, words, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(LoadError, match=words):
        qlab.estimate(tmp_path)


def test_what_is_counted_otherwise_is_noted():
    found = qlab.estimate(
        {**SMALL, "torch_dtype": "float99", "quantization_config": {"quant_method": "gptq"}},
        train=SHORT,
    )
    assert "float99" in found.notes[1] or "float99" in found.notes[0]
    assert any("gptq" in note for note in found.notes)


def test_estimating_reads_no_weights():
    before = mx.get_active_memory()
    qlab.estimate(
        {
            **SMALL,
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "head_dim": 128,
            "intermediate_size": 14336,
        },
        Q(),
        train=SHORT,
    )
    assert mx.get_active_memory() - before < 5e6


def test_a_run_takes_as_many_blocks_in_flight_as_pay_and_fit(monkeypatch):
    """As on a GPU: more than one is worth its memory, and the host runs ahead of blocks."""
    monkeypatch.setitem(WINDOWS, "cpu", (1, 2, 4))
    monkeypatch.setattr(
        "qlab.engine.memory.formulas.runahead", lambda: Runahead(10**6, kernels=True)
    )
    train = TrainConfig(batch_size=2, max_seq_length=128, grad_checkpoint=True)
    estimate = partial(qlab.estimate, {**CONFIG, "num_hidden_layers": 8})
    sizes = [estimate(train=replace(train, window=n)).high_nbytes for n in (1, 2, 4)]
    assert sizes[0] < sizes[1] < sizes[2]
    for free, window in [(sizes[2], 4), (sizes[2] - 1, 2), (sizes[1] - 1, 1), (sizes[0] // 2, 1)]:
        found = with_largest_window(estimate(train=train, machine=free))
        assert (
            found.setup.train == replace(train, window=window)
            and found.high_nbytes == sizes[(1, 2, 4).index(window)]
        )
    chosen = estimate(train=replace(train, window=2), machine=sizes[2])
    assert with_largest_window(chosen) is chosen  # what a user chose stays
    whole = estimate(train=replace(train, grad_checkpoint=False), machine=1e9)
    assert with_largest_window(whole) is whole
