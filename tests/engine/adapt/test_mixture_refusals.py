"""Malformed adapters of a mixture's experts: each has its own clear error, and nothing changes."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from qlab.core.config.lora import LoRAConfig
from qlab.engine.adapt.files import load_adapter
from qlab.engine.adapt.files import save_adapter
from qlab.errors import ConfigError
from qlab.errors import LoadError
from tests.engine.adapt.test_files import stirred as written
from tests.engine.adapt.test_mixture import UP, mixture
from tests.tiny import on_mlx, tiny

SPOILT = {
    "more experts": (
        lambda a: a.update({f"{UP}.lora_a": mx.zeros((5, 4, 64))}),
        r"up_proj.lora_a' has shape \(5, 4, 64\), not \(4, 4, 64\)",
    ),
    "one expert only": (
        lambda a: a.update({f"{UP}.lora_b": mx.zeros((128, 4))}),
        r"up_proj.lora_b' has shape \(128, 4\), not \(4, 128, 4\)",
    ),
    "turned round": (
        lambda a: a.update({f"{UP}.lora_a": mx.zeros((4, 64, 4))}),
        r"up_proj.lora_a' has shape \(4, 64, 4\)",
    ),
    "no second factor": (lambda a: a.pop(f"{UP}.lora_b"), "up_proj.lora_b' is missing"),
    "an expert of its own": (
        lambda a: a.update({UP.replace("up_proj", "0.up_proj") + ".lora_a": mx.zeros((4, 64))}),
        "does not have.*Did you mean",
    ),
    "lengths": (
        lambda a: a.update({f"{UP}.m": mx.ones((4, 128))}),
        "up_proj.m' is no array of such an adapter",
    ),
    "no number": (
        lambda a: a.update({f"{UP}.lora_b": mx.full((4, 128, 4), mx.nan)}),
        "NaN or infinity.*up_proj.lora_b",
    ),
}


@pytest.mark.parametrize("case", SPOILT, ids=lambda x: x.replace(" ", "_"))
@on_mlx
def test_malformed_factors_of_experts_are_refused_by_their_own_error_and_nothing_changes(
    case, tmp_path
):
    module, spec = mixture()
    lora = LoRAConfig(rank=4, keys="*.switch_mlp.up_proj")
    save_adapter(tmp_path / "a", written(module, spec, lora), lora, spec, "base")
    file, (spoil, words) = tmp_path / "a" / "adapters.safetensors", SPOILT[case]
    held = {key: mx.array(array) for key, array in mx.load(str(file)).items()}
    spoil(held)
    mx.save_safetensors(str(file), held)
    before, arrays = (
        {x.name: x.read_bytes() for x in file.parent.iterdir()},
        dict(tree_flatten(module.parameters())),
    )
    with pytest.raises(LoadError, match=words):
        load_adapter(tmp_path / "a", spec)
    assert {x.name: x.read_bytes() for x in file.parent.iterdir()} == before
    now = dict(tree_flatten(module.parameters()))
    assert now.keys() == arrays.keys() and all(now[path] is arrays[path] for path in arrays)


@on_mlx
def test_an_adapter_of_a_mixture_with_other_experts_is_refused(tmp_path):
    module, spec = mixture()
    lora = LoRAConfig(rank=4, keys="*.switch_mlp.up_proj")
    save_adapter(tmp_path / "a", written(module, spec, lora), lora, spec, "base")
    _, more = tiny("mixtral", num_local_experts=8)
    with pytest.raises(
        LoadError, match=r"no adapter for 'tiny'.*shape \(4, 4, 64\), not \(8, 4, 64\)"
    ):
        load_adapter(tmp_path / "a", more)
    _, plain = tiny("llama")
    with pytest.raises(LoadError, match="a layer that the model does not have"):
        load_adapter(tmp_path / "a", plain)


def test_a_rank_above_the_width_of_an_expert_names_the_layer_and_the_largest():
    _, spec = mixture("qwen3_moe")
    with pytest.raises(
        ConfigError,
        match=r"rank=33 .*'model.layers.0.mlp.switch_mlp.gate_proj' \(4 × 32 × 64\); the largest is 32",
    ):
        LoRAConfig(rank=33, keys="*.switch_mlp.*").targets(spec)
