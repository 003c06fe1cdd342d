"""Which steps are of one kind, and how blocks are taken out of a model."""

from __future__ import annotations

from qlab.core.config.lora import LoRAConfig
from qlab.core.config.quant import QuantConfig, QuantPlan
from qlab.core.config.spec import LayerSpec, ModelSpec
from qlab.core.memory.setup import Setup
from qlab.engine.memory.formulas import _without_one_block
from qlab.engine.memory.step_graphs import _moved_paths
from qlab.engine.memory.step_kind import step_kind

LAYERS = [
    LayerSpec(path="model.embed_tokens", kind="embedding", shape=(256, 64), nbytes=32768),
    *(
        LayerSpec(
            path=f"model.layers.{block}.mlp.{name}", kind="linear", shape=(64, 64), nbytes=8192
        )
        for block in range(6)
        for name in ("up_proj", "down_proj")
    ),
    LayerSpec(path="lm_head", kind="linear", shape=(256, 64), nbytes=32768),
]
SPEC = ModelSpec("toy", tuple(LAYERS))


def kind(lora: LoRAConfig, overrides: dict | None = None):
    return step_kind(SPEC, Setup(QuantPlan(QuantConfig(), overrides or {}), lora))


def test_blocks_below_the_lowest_adapted_one_do_not_count():
    assert kind(LoRAConfig()).counts == (6,)
    assert kind(LoRAConfig(num_layers=2)).counts == (2,)


def test_an_adapted_embedding_lies_below_all_blocks():
    assert sum(kind(LoRAConfig(keys=["embed_tokens"])).counts) == 6


def test_blocks_of_another_storage_are_a_group_of_their_own():
    groups = kind(LoRAConfig(), {"model.layers.3.mlp.up_proj": None}).groups
    assert list(groups.values()) == [[0, 1, 2, 4, 5], [3]]


def test_kinds_differ_by_number_of_blocks_only_below_the_sample():
    few, more, most = (kind(LoRAConfig(num_layers=count)) for count in (2, 4, 6))
    assert more.key(3) == most.key(3) != few.key(3)
    assert more.key(4) != most.key(4)


def test_layers_move_to_the_places_of_the_blocks_that_are_left():
    paths = [layer.path for layer in LAYERS]
    moved = _moved_paths(paths, "model.layers", [1, 4])
    assert moved["model.layers.4.mlp.up_proj"] == "model.layers.1.mlp.up_proj"
    assert moved["lm_head"] == "lm_head" and "model.layers.0.mlp.up_proj" not in moved


def test_one_block_less_is_the_first_of_its_group():
    assert _without_one_block([[0, 1, 2], [3, 4]], 1) == [0, 1, 2, 4]
