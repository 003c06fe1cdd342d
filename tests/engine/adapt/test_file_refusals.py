"""Malformed adapter folders: each has its own clear error that names file and key, and nothing changes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from qlab.core.config.lora import LoRAConfig
from qlab.engine.adapt.files import load_adapter
from qlab.engine.adapt.files import save_adapter
from qlab.errors import LoadError
from tests.engine.adapt.test_files import stirred
from tests.tiny import on_mlx, tiny

Q = "model.layers.1.self_attn.q_proj"
PQ = f"base_model.model.{Q}"


def settings(**changes) -> Callable[[Path], None]:
    """Change adapter_config.json; None takes a key away, a dict is merged."""

    def spoil(folder: Path) -> None:
        file = folder / "adapter_config.json"
        config = json.loads(file.read_text())
        config.pop("qlab", None)
        for key, value in changes.items():
            if value is None:
                config.pop(key)
            else:
                both = isinstance(value, dict) and isinstance(config.get(key), dict)
                config[key] = {**config[key], **value} if both else value
        file.write_text(json.dumps(config))

    return spoil


def arrays(change: Callable[[dict[str, mx.array]], None]) -> Callable[[Path], None]:
    """Change the weights."""

    def spoil(folder: Path) -> None:
        file = next(folder.glob("*.safetensors"))
        held = {key: mx.array(value) for key, value in mx.load(str(file)).items()}
        change(held)
        mx.eval(held)
        mx.save_safetensors(str(file), held)

    return spoil


def text(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content)


def cut(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    next(folder.glob("*.safetensors")).rename(folder / "adapter_model.bin")


def put(key: str, array: np.ndarray | None) -> Callable[[Path], None]:
    return arrays(
        lambda held: held.pop(key) if array is None else held.update({key: mx.array(array)})
    )


MLX = {
    "no settings": (
        lambda folder: (folder / "adapter_config.json").unlink(),
        "has no adapter_config.json",
    ),
    "no weights": (
        lambda folder: (folder / "adapters.safetensors").unlink(),
        "has no adapters.safetensors",
    ),
    "settings are no JSON": (
        text("adapter_config.json", b"{rank: 4"),
        "adapter_config.json is not JSON",
    ),
    "settings are no text": (
        text("adapter_config.json", b"\xff\xfe\x00"),
        "adapter_config.json is not JSON",
    ),
    "settings are a list": (text("adapter_config.json", b"[1]"), "holds no settings, but a list"),
    "weights are cut short": (cut, "adapters.safetensors is cut short"),
    "weights are something else": (
        text("adapters.safetensors", b"PK" * 40),
        "not a safetensors file",
    ),
    "weights are empty": (text("adapters.safetensors", b""), "not a safetensors file"),
    "unknown type": (
        settings(fine_tune_type="lora2"),
        "fine_tune_type 'lora2' is not.*Did you mean 'lora'",
    ),
    "whole layers": (settings(fine_tune_type="full"), "holds whole layers, not an adapter"),
    "no parameters": (settings(lora_parameters=None), "lora_parameters must give rank and scale"),
    "no scale": (settings(lora_parameters=[4]), "lora_parameters must give rank and scale"),
    "alpha, not scale": (
        settings(lora_parameters={"alpha": 4}),
        "lora_parameters has 'alpha', which is unknown",
    ),
    "scale of zero": (settings(lora_parameters={"scale": 0}), "scale=0 is not legal"),
    "dropout above one": (settings(lora_parameters={"dropout": 1.5}), "dropout=1.5 is not legal"),
    "another rank": (
        settings(lora_parameters={"rank": 8}),
        r"'.*lora_a' has shape \(64, 4\), not \(64, 8\)",
    ),
    "rank in words": (settings(lora_parameters={"rank": "four"}), "rank='four' is not legal"),
    "layers in words": (settings(num_layers="all"), "num_layers='all' is not a number"),
    "keys in words": (settings(lora_parameters={"keys": "q_proj"}), "keys='q_proj' is not a list"),
    "more layers than written": (
        settings(lora_parameters={"keys": ["mlp.up_proj", "self_attn.q_proj"]}),
        "no arrays of 'model.layers.0.mlp.up_proj'",
    ),
    "fewer layers than written": (
        settings(num_layers=1),
        "arrays of 'model.layers.0.self_attn.q_proj', which.*do not adapt",
    ),
    "an array is missing": (put(f"{Q}.lora_b", None), rf"'{Q}.lora_b' is missing"),
    "an array too many": (
        put("model.layers.9.self_attn.q_proj.lora_a", np.zeros((64, 4), np.float32)),
        "does not have.*Did you mean",
    ),
    "an array of no adapter": (
        put(f"{Q}.weight", np.zeros((64, 64), np.float32)),
        "'.*weight' is no array of such an adapter",
    ),
    "no number": (
        put(f"{Q}.lora_a", np.full((64, 4), np.nan, np.float32)),
        "NaN or infinity.*q_proj.lora_a",
    ),
    "infinite": (put(f"{Q}.lora_b", np.full((4, 64), np.inf, np.float32)), "NaN or infinity"),
    "turned round": (
        put(f"{Q}.lora_a", np.zeros((4, 64), np.float32)),
        r"has shape \(4, 64\), not \(64, 4\)",
    ),
    "whole numbers": (
        put(f"{Q}.lora_a", np.zeros((64, 4), np.int32)),
        "is mlx.core.int32, not a floating-point",
    ),
    "no arrays at all": (
        arrays(lambda held: held.clear()),
        "adapters.safetensors is not a safetensors file",
    ),
    "DoRA without magnitudes": (settings(fine_tune_type="dora"), "q_proj.m' is missing"),
    "qlab says another thing": (
        lambda folder: text(
            "adapter_config.json",
            (folder / "adapter_config.json")
            .read_bytes()
            .replace(b'"scale": 2.0', b'"scale": 3.0', 1),
        )(folder),
        "the block qlab says another adapter",
    ),
    "qlab of another version": (
        lambda folder: text(
            "adapter_config.json",
            (folder / "adapter_config.json").read_bytes().replace(b'"rslora"', b'"slora"'),
        )(folder),
        "the block qlab has 'slora'",
    ),
}
PEFT = {
    "no weights": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        "has no adapter_model.safetensors",
    ),
    "pickled weights": (pickled, "It holds adapter_model.bin. Pickled weights can run code"),
    "weights are cut short": (cut, "adapter_model.safetensors is cut short"),
    "another method": (settings(peft_type="IA3"), "peft_type 'IA3' is not LORA"),
    "biases": (settings(bias="lora_only"), "bias='lora_only'"),
    "whole modules": (
        settings(modules_to_save=["lm_head"]),
        "modules_to_save=.'lm_head'.* is not something that qlab has",
    ),
    "turned weights": (settings(fan_in_fan_out=True), "fan_in_fan_out=True"),
    "biases of the factors": (settings(lora_bias=True), "lora_bias=True"),
    "repeated layers": (settings(layer_replication=[[0, 2], [1, 3]]), "layer_replication"),
    "new tokens": (settings(trainable_token_indices=[3]), "trainable_token_indices"),
    "activated by tokens": (settings(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens"),
    "an option of tomorrow": (
        settings(use_new_thing=True),
        "use_new_thing=True is not something that qlab has",
    ),
    "a start that changes the base": (
        settings(init_lora_weights="pissa"),
        "init_lora_weights='pissa' changes the base too",
    ),
    "alpha in words": (settings(lora_alpha="16"), "lora_alpha='16' is not a number"),
    "no rank": (settings(r=None), "r=None is not a number"),
    "another rank": (settings(r=8), "have ranks 4 and 4, and the settings say 8"),
    "alpha of zero": (settings(lora_alpha=0), "scale=0.0 is not legal"),
    "a pattern that is no table": (settings(alpha_pattern=[1]), "alpha_pattern=.* is not a table"),
    "a pattern that gives words": (
        settings(alpha_pattern={"q_proj": "big"}),
        "pattern 'q_proj' gives 'big'",
    ),
    "a target that is no pattern": (
        settings(target_modules="q_proj("),
        "adapter_config.json: missing",
    ),
    "no targets": (settings(target_modules=None), "target_modules=None is neither"),
    "targets without arrays": (
        settings(target_modules=["q_proj", "up_proj"]),
        "no arrays of 'model.layers.0.mlp.up_proj'",
    ),
    "DoRA without magnitudes": (settings(use_dora=True), "has no array 'lora_magnitude_vector'"),
    "magnitudes without DoRA": (
        put(f"{PQ}.lora_magnitude_vector", np.ones(64, np.float32)),
        "has an array 'lora_magnitude_vector'",
    ),
    "an array is missing": (
        put(f"{PQ}.lora_B.weight", None),
        f"'{Q}' has no array 'lora_B.weight'",
    ),
    "an unknown array": (
        put(f"{PQ}.lora_C.weight", np.ones((4, 4), np.float32)),
        "lora_C.weight' is no array of a LoRA",
    ),
    "a weight of the base": (
        put(f"{PQ}.base_layer.weight", np.ones((64, 64), np.float32)),
        "base_layer.weight' is no array of a LoRA",
    ),
    "a layer too many": (
        put(f"{PQ.replace('1', '7')}.lora_A.weight", np.ones((4, 64), np.float32)),
        "does not have.*Did you mean",
    ),
    "an embedding's array on a linear layer": (
        put(f"{PQ}.lora_embedding_A", np.ones((4, 64), np.float32)),
        "for another kind of layer",
    ),
    "one axis": (
        put(f"{PQ}.lora_A.weight", np.ones(64, np.float32)),
        "has shape .64,., not 2 axes",
    ),
    "wrong width": (
        put(f"{PQ}.lora_A.weight", np.ones((4, 32), np.float32)),
        r"has shape \(32, 4\), not \(64, 4\)",
    ),
    "no number": (
        put(f"{PQ}.lora_A.weight", np.full((4, 64), np.nan, np.float32)),
        "NaN or infinity",
    ),
}


def state(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


@pytest.mark.parametrize(
    "format, case",
    [*(("mlx", case) for case in MLX), *(("peft", case) for case in PEFT)],
    ids=lambda x: x.replace(" ", "_"),
)
@on_mlx
def test_a_malformed_adapter_is_refused_by_its_own_error(format, case, tmp_path):
    spoil, words = (MLX if format == "mlx" else PEFT)[case]
    module, spec = tiny()
    lora = LoRAConfig(rank=4, keys=("q_proj",))
    save_adapter(tmp_path / "a", stirred(module, spec, lora), lora, spec, "base", format=format)
    assert load_adapter(tmp_path / "a", spec)[0] == lora
    spoil(tmp_path / "a")
    before = state(tmp_path / "a")
    with pytest.raises(LoadError, match=words) as caught:
        load_adapter(tmp_path / "a", spec)
    assert str(tmp_path / "a") in str(caught.value), "names the file"
    assert state(tmp_path / "a") == before


@pytest.mark.parametrize("format", ["mlx", "peft"])
@on_mlx
def test_an_adapter_of_another_model_is_refused(format, tmp_path):
    module, spec = tiny()
    lora = LoRAConfig(rank=4, keys=("q_proj",))
    save_adapter(tmp_path / "a", stirred(module, spec, lora), lora, spec, "base", format=format)
    _, wide = tiny(hidden_size=128)
    with pytest.raises(LoadError, match=r"no adapter for 'tiny'.*shape"):
        load_adapter(tmp_path / "a", wide)
    _, other = tiny("gpt_neox")
    with pytest.raises(LoadError, match="a layer that the model does not have"):
        load_adapter(tmp_path / "a", other)
    _, long = tiny(num_hidden_layers=4)
    with pytest.raises(LoadError, match=r"no arrays of 'model.layers.3.self_attn.q_proj'"):
        load_adapter(tmp_path / "a", long)


@on_mlx
def test_a_place_that_is_no_folder_is_refused_with_the_nearest_name(tmp_path):
    _, spec = tiny()
    (tmp_path / "adapter").mkdir()
    with pytest.raises(LoadError, match="does not exist.*Did you mean 'adapter'"):
        load_adapter(tmp_path / "adaptor", spec)
    (tmp_path / "file").write_text("x")
    with pytest.raises(LoadError, match="is a file; an adapter is a folder"):
        load_adapter(tmp_path / "file", spec)
