"""What may be asked of an adapter and of a training run, and which layers it means."""

from __future__ import annotations

import re
from inspect import signature

import copy
import pickle

import pytest

from qlab import registry
from qlab.core.config.spec import LayerSpec
from qlab.core.config.spec import ModelSpec
from qlab.core.config.lora import LoRAConfig
from qlab.core.config.train import TrainConfig
from qlab.errors import ConfigError
from qlab.errors import LayerNotFoundError

BLOCKS, WIDTH, SLIM = 4, 64, 16
SHAPES = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.v_proj": (SLIM, WIDTH),
    "mlp.up_proj": (128, WIDTH),
}
SPEC = ModelSpec(
    "toy",
    (
        LayerSpec(path="model.embed_tokens", kind="embedding", shape=(97, WIDTH)),
        *(
            LayerSpec(path=f"model.layers.{i}.{role}", kind="linear", shape=shape)
            for i in range(BLOCKS)
            for role, shape in SHAPES.items()
        ),
        LayerSpec(path="lm_head", kind="linear", shape=(97, WIDTH)),
    ),
)


def paths(**settings) -> list[str]:
    return [layer.path for layer in LoRAConfig(**{"rank": 4, **settings}).targets(SPEC)]


@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(),
        LoRAConfig(
            rank=16,
            scale=0.5,
            dropout=0.1,
            num_layers=2,
            keys=("q_proj", "v_proj"),
            dtype="bfloat16",
        ),
        LoRAConfig(keys=["q_proj"]),
        LoRAConfig(keys="mlp.*"),
        TrainConfig(),
        TrainConfig(
            iters=1,
            epochs=0.5,
            batch_size=2,
            max_seq_length=3,
            learning_rate=4e-5,
            lr_schedule="cosine",
            warmup=6,
            optimizer="lion",
            weight_decay=0.1,
            max_grad_norm=0.0,
            grad_checkpoint=True,
        ),
        *(TrainConfig(optimizer=name) for name in registry.shelf("optimizers")),
        *(LoRAConfig(kind=name) for name in registry.shelf("adapters")),
    ],
    ids=str,
)
def test_repr_pastes_back(config):
    pasted = eval(repr(config))
    assert pasted == config and hash(pasted) == hash(config)
    assert repr(pasted) == repr(config)
    assert pickle.loads(pickle.dumps(config)) == config and copy.deepcopy(config) == config


def test_values_by_position_still_work_and_warn():
    with pytest.warns(DeprecationWarning, match="rank=…, scale=…"):
        assert LoRAConfig(16, 0.5) == LoRAConfig(rank=16, scale=0.5)
    with pytest.warns(DeprecationWarning, match="iters=…"):
        assert TrainConfig(3) == TrainConfig(iters=3)


def test_old_names_of_the_kinds_still_work_and_warn():
    with pytest.warns(DeprecationWarning, match="adapter_kind"):
        assert LoRAConfig().adapter is LoRAConfig().adapter_kind
    with pytest.warns(DeprecationWarning, match="optimizer_kind"):
        assert TrainConfig().kind is TrainConfig().optimizer_kind


@pytest.mark.parametrize(
    ("config", "name", "value", "legal"),
    [
        *(
            (LoRAConfig, "rank", value, "a whole number, 1 or more")
            for value in (0, -8, 8.0, "8", True, None)
        ),
        *(
            (LoRAConfig, "num_layers", value, "a number of blocks, or -1 for all")
            for value in (0, -2, 1.5, "4", True, None)
        ),
        *(
            (LoRAConfig, "dropout", value, r"a share in \[0, 1\)")
            for value in (1, 1.5, -0.1, "0.1", None, False, float("nan"))
        ),
        (LoRAConfig, "dtype", "float8", "choose one of float32, bfloat16.*Did you mean 'float"),
        (LoRAConfig, "dtype", "bf16", "choose one of float32, bfloat16"),
        *((LoRAConfig, "dtype", value, "choose one of") for value in ("float16", 16, None)),
        *(
            (LoRAConfig, "scale", value, "a number other than 0")
            for value in (0, "2", True, float("nan"), float("inf"))
        ),
        *(
            (LoRAConfig, "keys", value, "a list of names or patterns")
            for value in (5, (), [], (1,))
        ),
        *(
            (TrainConfig, name, value, "a whole number, 1 or more")
            for name in ("iters", "batch_size", "grad_accumulation_steps")
            for value in (0, -1, 2.0, "2", True, None)
        ),
        *(
            (TrainConfig, "max_seq_length", value, "a whole number, 2 or more")
            for value in (1, 0, 512.0, True)
        ),
        *(
            (TrainConfig, name, value, "a whole number, 0 or more")
            for name in ("loss_chunk", "warmup", "steps_per_eval", "early_stop", "seed")
            for value in (-1, 7.0, False, None)
        ),
        *(
            (TrainConfig, name, value, "True or False")
            for name in ("mask_prompt", "pack")
            for value in (1, None, "yes")
        ),
        *(
            (TrainConfig, name, value, "a number, 0 or more")
            for name in ("weight_decay", "max_grad_norm")
            for value in (-1, None)
        ),
        *((TrainConfig, "epochs", value, "a number above 0, or None") for value in (0, -1, "1")),
        *(
            (TrainConfig, "val_batches", value, "a whole number, 1 or more")
            for value in (0, -2, None)
        ),
        (
            TrainConfig,
            "lr_schedule",
            "cosin",
            "choose one of constant, linear, cosine. Did you mean 'cosine'",
        ),
        (TrainConfig, "on_nonfinite", "ignore", "choose one of skip, stop"),
        (LoRAConfig, "init", "loftq", "choose one of default, residual, diagonal, qera"),
        (LoRAConfig, "rslora", 1, "True or False"),
        *(
            (TrainConfig, "grad_checkpoint", value, "True or False")
            for value in (1, 0, "yes", None)
        ),
        *(
            (TrainConfig, "learning_rate", value, "a number above 0")
            for value in (0, -1e-4, "1e-4", None, True, float("inf"), float("nan"))
        ),
    ],
)
def test_an_illegal_value_is_refused_by_name_with_what_is_legal(config, name, value, legal):
    with pytest.raises(
        ConfigError, match=rf"^{name}={re.escape(repr(value))} is not legal; .*{legal}"
    ):
        config(**{name: value})


def test_a_name_that_stands_on_no_shelf_is_refused_with_the_nearest():
    kinds, optimizers = (
        ", ".join(registry.shelf("adapters")),
        ", ".join(registry.shelf("optimizers")),
    )
    with pytest.raises(
        ConfigError, match=f"kind of adapter 'lorra'; choose one of {kinds}. Did you mean 'lora'"
    ):
        LoRAConfig(kind="lorra")
    with pytest.raises(
        ConfigError, match=f"optimizer 'adamv'; choose one of {optimizers}. Did you mean 'adamw'"
    ):
        TrainConfig(optimizer="adamv")


def test_without_keys_every_linear_layer_of_the_blocks_is_meant_in_model_order():
    assert paths() == [f"model.layers.{i}.{role}" for i in range(BLOCKS) for role in SHAPES]


@pytest.mark.parametrize("count", [1, 2, BLOCKS])
def test_num_layers_counts_from_the_last_block(count):
    blocks = range(BLOCKS - count, BLOCKS)
    assert paths(num_layers=count) == [
        f"model.layers.{i}.{role}" for i in blocks for role in SHAPES
    ]
    assert paths(num_layers=count, keys="q_proj") == [
        f"model.layers.{i}.self_attn.q_proj" for i in blocks
    ]


def test_more_blocks_than_the_model_has_are_refused_with_their_number():
    with pytest.raises(
        ConfigError, match=f"num_layers=5, but 'toy' has {BLOCKS} blocks; use -1 for all"
    ):
        LoRAConfig(num_layers=BLOCKS + 1).targets(SPEC)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("v_proj", [f"model.layers.{i}.self_attn.v_proj" for i in range(BLOCKS)]),
        ("mlp.up_proj", [f"model.layers.{i}.mlp.up_proj" for i in range(BLOCKS)]),
        ("model.layers.2.self_attn.q_proj", ["model.layers.2.self_attn.q_proj"]),
        ("model.layers.1.*", [f"model.layers.1.{role}" for role in SHAPES]),
        (
            "*.[qv]_proj",
            [f"model.layers.{i}.self_attn.{x}_proj" for i in range(BLOCKS) for x in "qv"],
        ),
        (["lm_head", "*.3.mlp.up_proj"], ["model.layers.3.mlp.up_proj", "lm_head"]),
    ],
    ids=str,
)
def test_a_key_is_a_name_the_end_of_a_path_or_a_pattern(keys, expected):
    assert paths(keys=keys) == expected


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("q_prj", "q_proj"),
        ("up_projection", "up_proj"),
        ("mlp.up_prog", r"mlp\.up_proj"),
        ("lm_haed", "lm_head"),
    ],
)
def test_a_key_that_matches_nothing_gets_the_nearest(key, hint):
    with pytest.raises(
        LayerNotFoundError,
        match=f"No layer of 'toy' matches the key '{key}'. Did you mean '{hint}'",
    ):
        LoRAConfig(rank=4, keys=("v_proj", key)).targets(SPEC)


def test_a_key_must_match_a_whole_name():
    with pytest.raises(LayerNotFoundError, match="'proj'"):
        LoRAConfig(keys="proj").targets(SPEC)


def test_keys_of_blocks_that_are_not_adapted_are_refused():
    with pytest.raises(
        ConfigError, match=r"gets an adapter: keys=\('model.layers.0.mlp.up_proj',\), num_layers=1"
    ):
        LoRAConfig(num_layers=1, keys="model.layers.0.mlp.up_proj").targets(SPEC)


def test_a_rank_above_the_width_names_the_layer_and_the_largest():
    assert len(LoRAConfig(rank=SLIM).targets(SPEC)) == BLOCKS * len(SHAPES)
    with pytest.raises(
        ConfigError,
        match=r"rank=17 .*'model\.layers\.0\.self_attn\.v_proj' \(16 × 64\); the largest is 16",
    ):
        LoRAConfig(rank=SLIM + 1).targets(SPEC)
    assert len(LoRAConfig(rank=WIDTH, keys=("q_proj", "up_proj")).targets(SPEC)) == 2 * BLOCKS


def test_the_number_of_trainable_numbers_is_that_of_both_factors():
    assert LoRAConfig(rank=4).size(SPEC) == BLOCKS * 4 * sum(
        out + width for out, width in SHAPES.values()
    )
    assert LoRAConfig(rank=4, keys="lm_head").size(SPEC) == 4 * (97 + WIDTH)


def test_derived_numbers():
    assert LoRAConfig(rank=16, scale=0.5).alpha == 8
    assert [LoRAConfig(dtype=dtype).itemsize for dtype in ("float32", "bfloat16")] == [4, 2]
    assert TrainConfig(batch_size=3, max_seq_length=100).tokens == 300


MIXED = ModelSpec(
    "mixed",
    (
        LayerSpec(path="model.embed_tokens", kind="embedding", shape=(97, WIDTH)),
        LayerSpec(path="model.layers.0.mlp.router", kind="linear", shape=(4, WIDTH)),
        LayerSpec(path="model.layers.0.mlp.experts.up_proj", kind="switch", shape=(4, 32, WIDTH)),
    ),
)


def test_a_key_of_a_layer_that_the_kind_does_not_adapt_is_refused(monkeypatch):
    from qlab.adapters.lora import LoRA

    class Plain(LoRA):
        name, adapts = "plain", ("linear", "embedding")

    monkeypatch.setitem(registry.shelf("adapters"), "plain", Plain())
    words = "'model.layers.0.mlp.experts.up_proj' is a stack of experts; kind='plain' adapts linear and embedding layers"
    with pytest.raises(ConfigError, match=words):
        LoRAConfig(rank=2, kind="plain", keys=("router", "up_proj")).targets(MIXED)
    assert [x.path for x in LoRAConfig(rank=2, kind="plain").targets(MIXED)] == [
        "model.layers.0.mlp.router"
    ]


@pytest.mark.parametrize("kind", registry.shelf("adapters"))
@pytest.mark.parametrize(
    "keys",
    [None, "all-linear", "model.layers.*", "*.mlp.*", ("router", "experts.up_proj")],
    ids=str,
)
def test_the_experts_of_a_mixture_are_meant_without_keys_by_name_and_by_pattern(keys, kind):
    found = LoRAConfig(rank=2, kind=kind, keys=keys).targets(MIXED)
    assert [x.path.split(".")[-1] for x in found] == ["router", "up_proj"]
    assert [
        x.path.split(".")[-1]
        for x in LoRAConfig(rank=2, kind=kind, keys="*.experts.*").targets(MIXED)
    ] == ["up_proj"]


def test_experts_count_one_pair_of_factors_each_and_a_rank_above_their_width_names_them():
    assert LoRAConfig(rank=4, keys="up_proj").size(MIXED) == 4 * 4 * (32 + WIDTH)
    assert LoRAConfig(rank=4, keys="up_proj", kind="dora").size(MIXED) == 4 * (
        4 * (32 + WIDTH) + 32
    )
    with pytest.raises(
        ConfigError,
        match=r"rank=33 .*'model\.layers\.0\.mlp\.experts\.up_proj' \(4 × 32 × 64\); the largest is 32",
    ):
        LoRAConfig(rank=33, keys="up_proj").targets(MIXED)


@pytest.mark.parametrize(
    "keys", ["embed_tokens", "*.embed_tokens", ("router", "model.embed_tokens")]
)
def test_an_embedding_is_adapted_when_it_is_named(keys):
    assert LoRAConfig(rank=2, keys=keys).targets(MIXED)[0].path == "model.embed_tokens"


def test_all_linear_is_what_none_means_and_goes_with_other_keys():
    assert LoRAConfig(rank=4, keys="all-linear").targets(SPEC) == LoRAConfig(rank=4).targets(SPEC)
    paths = [x.path for x in LoRAConfig(rank=4, keys=("all-linear", "lm_head")).targets(SPEC)]
    assert len(paths) == len(LoRAConfig(rank=4).targets(SPEC)) + 1 and "lm_head" in paths


def test_a_pattern_that_matches_other_layers_too_leaves_the_embedding_out():
    assert [x.kind for x in LoRAConfig(rank=2, keys="model.*").targets(MIXED)] == [
        "linear",
        "switch",
    ]


def test_a_setting_that_does_not_exist_is_refused_with_the_nearest():
    with pytest.raises(
        ConfigError, match="TrainConfig: 'iter' is no setting. Did you mean 'iters'.*learning_rate"
    ):
        TrainConfig(iter=3)
    with pytest.raises(ConfigError, match="LoRAConfig: 'rnk' is no setting. Did you mean 'rank'"):
        LoRAConfig(rnk=3)
    assert str(signature(LoRAConfig)).startswith("(*, rank: ")  # what an editor completes
