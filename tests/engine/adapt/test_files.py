"""Adapter folders: stock mlx-lm gives the same logits, PEFT's documented forward too, and both come back as they went."""

from __future__ import annotations

import json
import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import qlab
from qlab.core.config.quant import QuantConfig
from qlab.core.config.lora import LoRAConfig
from qlab.engine.adapt.parameters import expected
from qlab.engine.adapt.attach import twin_with
from qlab.engine.adapt.files import load_adapter
from qlab.engine.adapt.files import save_adapter
from qlab.engine.adapt.targets import mlx_targets
from qlab.engine.adapt.targets import shortest_keys
from qlab.runtime.job import mlx_call
from qlab.nn.linear import weight_of
from qlab.engine.models.skeleton import describe
from qlab.engine.models.skeleton import skeleton
from qlab.engine.models.surgery import cast
from qlab.engine.models.surgery import module_at
from qlab.errors import ConfigError
from qlab.errors import SaveError
from qlab.errors import WeightsError
from tests.tiny import on_mlx, quantized, settings, tiny

TOKENS = mx.array([[5, 10, 7, 90, 33, 2]])
LORAS = [
    LoRAConfig(rank=4, scale=3.0),
    LoRAConfig(rank=4, kind="dora", dropout=0.1),
    LoRAConfig(rank=2, keys=("q_proj", "v_proj"), num_layers=2, rslora=True),
    LoRAConfig(
        rank=4, keys=("*.1.mlp.*", "model.layers.0.self_attn.o_proj"), dtype="bfloat16", init="qera"
    ),
    LoRAConfig(rank=4, keys=("down_proj", "lm_head"), num_layers=1),
    LoRAConfig(rank=4, keys=("lm_head",), kind="dora"),
]


def stirred(module, spec, lora: LoRAConfig) -> dict[str, mx.array]:
    """Parameters with an effect, the same for the same adapter."""
    made = {}
    for number, (path, shape) in enumerate(expected(spec, lora).items()):
        made[path] = mx.random.normal(shape, key=mx.random.key(number)) * 0.2
        if path.endswith(".m"):
            made[path] = mx.linalg.norm(
                weight_of(module_at(module, path[:-2]), mx.float32), axis=-1
            ) * (1 + made[path])
        made[path] = made[path].astype(getattr(mx, lora.dtype))
    mx.eval(made)
    return made


def words(lora: LoRAConfig) -> str:
    return f"{lora.kind} {lora.keys} {lora.num_layers}"


def equal(a: dict[str, mx.array], b: dict[str, mx.array]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and mx.array_equal(a[k], b[k]).item() for k in a
    )


# --- mlx-lm -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """The demo model, saved at 16 and at 4 bits."""
    made = {name: tmp_path_factory.mktemp(name) / "base" for name in ("16-bit", "4-bit")}
    model = qlab.load("demo")
    model.save(made["16-bit"])
    qlab.Quantizer(model, bits=4).quantize().save(made["4-bit"])
    return made


@pytest.mark.parametrize(
    "storage, kind, keys",
    [
        (storage, kind, keys)
        for storage in ("16-bit", "4-bit")
        for kind in ("lora", "dora")
        for keys in (None, ("q_proj", "embed_tokens"), ("*.3.mlp.*",))
        # mlx-lm's DoRA reads no quantized embedding (and save_adapter says so)
        if (storage, kind, keys) != ("4-bit", "dora", ("q_proj", "embed_tokens"))
    ],
    ids=str,
)
def test_stock_mlx_lm_gives_the_same_logits(storage, kind, keys, bases, tmp_path):
    base = qlab.load(bases[storage])
    lora = LoRAConfig(rank=4, kind=kind, keys=keys, num_layers=5, scale=0.5)

    def ours():
        parameters = stirred(base.module, base.spec, lora)
        note = save_adapter(tmp_path / "a", parameters, lora, base.spec, str(bases[storage]))
        assert note.startswith("Saved in mlx-lm's layout; mlx_lm.load")
        plain = cast(base.module, mx.float32)(TOKENS)
        return np.array(twin_with(base.module, base.spec, lora, parameters)(TOKENS)), np.array(
            plain
        )

    def stock():
        import mlx_lm

        module, _ = mlx_lm.load(str(bases[storage]), adapter_path=str(tmp_path / "a"))
        return np.array(cast(module, mx.float32)(TOKENS))

    (wanted, plain), got = mlx_call(ours), mlx_call(stock)
    assert (
        np.abs(got - wanted).max()
        < 1e-3 * wanted.std()
        < 0.1 * wanted.std()
        < np.abs(plain - wanted).max()
    )


@pytest.mark.parametrize(
    "name",
    ["llama", "qwen3_moe", "gemma3_text", "gpt_neox", "lfm2", "mistral3", "mamba", "nanochat"],
)
@pytest.mark.parametrize("num_layers", [-1, 2])
@on_mlx
def test_mlx_lm_adapts_exactly_the_layers_of_the_adapter_in_every_architecture(name, num_layers):
    from mlx_lm.tuner.utils import linear_to_lora_layers

    _, spec = tiny(name)
    linear = [layer for layer in spec.layers if layer.kind == "linear" and layer.block is not None]
    for keys in (None, (linear[0].role,), (linear[-1].role, linear[0].path)):
        lora = LoRAConfig(rank=2, keys=keys, num_layers=num_layers)
        count, said_keys = mlx_targets(lora, spec)
        module = skeleton(settings(name))
        linear_to_lora_layers(
            module, count, {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": said_keys}
        )
        found = {path for path, leaf in module.named_modules() if "lora_a" in leaf}
        assert found == {layer.path for layer in lora.targets(spec)}


@on_mlx
def test_names_within_blocks_are_used_where_they_can_say_it_and_paths_elsewhere():
    _, spec = tiny()
    last = LoRAConfig(rank=2, keys=("q_proj",), num_layers=2)
    assert mlx_targets(last, spec) == (2, ["self_attn.q_proj"])
    assert mlx_targets(LoRAConfig(rank=2, keys=("q_proj", "lm_head")), spec) == (
        -1,
        ["self_attn.q_proj", "lm_head"],
    )
    assert mlx_targets(LoRAConfig(rank=2, keys=("lm_head",)), spec) == (-1, ["lm_head"])
    middle = LoRAConfig(rank=2, keys=("*.1.*",))
    assert mlx_targets(middle, spec)[0] == -1 and all(
        key.startswith("model.layers.1.") for key in mlx_targets(middle, spec)[1]
    )
    for lora in (last, middle, LoRAConfig(rank=2, num_layers=1)):
        paths = [layer.path for layer in lora.targets(spec)]
        assert shortest_keys(LoRAConfig(rank=2), paths, spec).targets(spec) == lora.targets(spec)
    assert shortest_keys(
        LoRAConfig(rank=2), [x.path for x in LoRAConfig(rank=2).targets(spec)], spec
    ) == LoRAConfig(rank=2)


@on_mlx
def test_what_mlx_lm_cannot_open_is_said_with_the_reason(tmp_path):
    module, spec = tiny()
    for storage, kind, keys, reason in [
        (QuantConfig("affine", 3), "dora", None, "DoRA fails on 3-bit weights"),
        (QuantConfig("nf4"), "lora", None, "cannot read the base"),
        (
            QuantConfig("affine", 4),
            "dora",
            ("q_proj", "embed_tokens"),
            "DoRA reads no quantized embedding",
        ),
    ]:
        base = quantized(module, spec, storage)
        about = describe(base, "tiny")
        lora = LoRAConfig(rank=2, kind=kind, keys=keys)
        parameters = stirred(base, about, lora)
        assert reason in save_adapter(tmp_path / kind, parameters, lora, about, "base")
        assert equal(load_adapter(tmp_path / kind, about)[1], parameters)


@on_mlx
def test_an_adapter_that_mlx_lm_trained_is_read(tmp_path):
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    module, spec = tiny()
    for kind, keys in (("lora", None), ("dora", ["self_attn.q_proj", "mlp.up_proj"])):
        stock = skeleton(settings("llama"))
        stock.update(module.parameters())
        stock.freeze()
        parameters = {"rank": 4, "scale": 20.0, "dropout": 0.0, **({"keys": keys} if keys else {})}
        linear_to_lora_layers(stock, 2, parameters, use_dora=kind == "dora")
        arrays = dict(tree_flatten(stock.trainable_parameters()))
        arrays = {
            k: mx.random.normal(a.shape, key=mx.random.key(i)) * 0.1 + (k[-2:] == ".m")
            for i, (k, a) in enumerate(arrays.items())
        }
        stock.load_weights(list(arrays.items()), strict=False)
        stock.eval()
        (tmp_path / kind).mkdir()
        mx.save_safetensors(str(tmp_path / kind / "adapters.safetensors"), arrays)
        written = {
            "fine_tune_type": kind,
            "num_layers": 2,
            "lora_parameters": parameters,
            "iters": 5,
            "train": True,
        }
        (tmp_path / kind / "adapter_config.json").write_text(json.dumps(written))
        lora, found, notes = load_adapter(tmp_path / kind, spec)
        assert (lora.kind, lora.scale, lora.num_layers, notes) == (kind, 20.0, 2, ())
        assert mx.allclose(
            twin_with(module, spec, lora, found)(TOKENS), stock(TOKENS), rtol=1e-3, atol=1e-4
        )


# --- PEFT -------------------------------------------------------------------------------------------------------------


def peft_weight(folder: Path, module, path: str) -> np.ndarray:
    """The weight that PEFT's forward amounts to (``tuners/lora/layer.py``: ``W + B·A·scaling``; DoRA as in ``dora.py``)."""
    config = json.loads((folder / "adapter_config.json").read_text())
    arrays = {
        k: np.array(v.astype(mx.float32))
        for k, v in mx.load(str(folder / "adapter_model.safetensors")).items()
    }
    scaling = config["lora_alpha"] / (np.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    name = f"base_model.model.{path}"
    weight = np.array(module_at(module, path).weight)
    whole = weight + scaling * arrays[f"{name}.lora_B.weight"] @ arrays[f"{name}.lora_A.weight"]
    if config["use_dora"]:
        whole *= (arrays[f"{name}.lora_magnitude_vector"] / np.linalg.norm(whole, axis=1))[:, None]
    return whole


@pytest.mark.parametrize("lora", LORAS, ids=words)
@on_mlx
def test_pefts_documented_forward_on_the_peft_files_gives_the_same_logits(lora, tmp_path):
    module, spec = tiny()
    parameters = stirred(module, spec, lora)
    note = save_adapter(
        tmp_path / "a", parameters, lora, spec, "some/base", format="peft", model_type="llama"
    )
    assert "PeftModel.from_pretrained" in note
    dense = skeleton(settings("llama"))
    dense.update(module.parameters())
    for layer in lora.targets(spec):
        module_at(dense, layer.path).weight = mx.array(
            peft_weight(tmp_path / "a", module, layer.path)
        )
    got, wanted = dense(TOKENS), twin_with(module, spec, lora, parameters)(TOKENS)
    assert mx.abs(got - wanted).max().item() < (1e-3 if lora.dtype == "float32" else 0.02)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base" and config[
        "lora_alpha"
    ] == pytest.approx(lora.alpha)


@on_mlx
def test_peft_targets_are_said_as_short_as_they_can_be(tmp_path):
    module, spec = tiny()

    def targets(**settings):
        lora = LoRAConfig(rank=2, **settings)
        save_adapter(tmp_path / "a", stirred(module, spec, lora), lora, spec, "b", format="peft")
        config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
        return config["target_modules"], config["layers_to_transform"]

    assert targets(keys="q_proj") == (["q_proj"], None)
    assert targets(keys="q_proj", num_layers=1) == (["q_proj"], [2])
    assert targets(keys=("*.0.mlp.up_proj", "*.1.self_attn.q_proj"))[0] == [
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    assert targets(keys=("q_proj", "lm_head")) == (["lm_head", "q_proj"], None)


@on_mlx
def test_names_that_transformers_may_not_have_are_said(tmp_path):
    module, spec = tiny("gpt_neox")
    lora = LoRAConfig(rank=2)
    note = save_adapter(
        tmp_path / "a",
        stirred(module, spec, lora),
        lora,
        spec,
        "b",
        format="peft",
        model_type="gpt_neox",
    )
    assert "for model_type 'gpt_neox' transformers may have others" in note


@on_mlx
def test_ranks_and_alphas_by_layer_become_one_rank_and_one_scale_exactly(tmp_path):
    module, spec = tiny()
    lora = LoRAConfig(rank=4, keys=("q_proj", "up_proj"))
    save_adapter(tmp_path / "a", stirred(module, spec, lora), lora, spec, "b", format="peft")
    arrays = mx.load(str(tmp_path / "a" / "adapter_model.safetensors"))
    wanted = {}
    for layer in lora.targets(spec):
        a, b = (arrays[f"base_model.model.{layer.path}.lora_{x}.weight"] for x in "AB")
        rank, alpha = (
            (2, 8) if layer.path.endswith("q_proj") else (4, 16 if ".1." in layer.path else 8)
        )
        arrays[f"base_model.model.{layer.path}.lora_A.weight"] = a = a[:rank]
        arrays[f"base_model.model.{layer.path}.lora_B.weight"] = b = b[:, :rank]
        wanted[layer.path] = alpha / rank * (b @ a)
    mx.save_safetensors(str(tmp_path / "a" / "adapter_model.safetensors"), arrays)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    config |= {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\.mlp\.up_proj": 16}}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    found, parameters, notes = load_adapter(tmp_path / "a", spec)
    assert found.rank == 4 and "Ranks 2 to 4" in notes[0]
    for path, product in wanted.items():
        made = found.scale * (parameters[f"{path}.lora_a"] @ parameters[f"{path}.lora_b"]).T
        assert mx.allclose(made, product, rtol=1e-5, atol=1e-6)


@on_mlx
def test_what_peft_has_no_word_for_is_refused_with_the_reason(tmp_path):
    for name, kind, reason in [
        ("llama tied", "lora", "output head too"),
        ("llama", "dora", "scales columns"),
    ]:
        module, spec = tiny(name)
        lora = LoRAConfig(rank=2, kind=kind, keys="embed_tokens")
        with pytest.raises(ConfigError, match=reason):
            save_adapter(
                tmp_path / "a", stirred(module, spec, lora), lora, spec, "b", format="peft"
            )
    assert not os.listdir(tmp_path)


# --- both -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["mlx", "peft"])
@pytest.mark.parametrize(
    "lora", [*LORAS, LoRAConfig(rank=2, keys=("embed_tokens", "q_proj"))], ids=words
)
@on_mlx
def test_what_was_written_comes_back_bit_for_bit(lora, format, tmp_path):
    module, spec = tiny()
    parameters = stirred(module, spec, lora)
    save_adapter(tmp_path / "a", parameters, lora, spec, "base", format=format)
    found, arrays, notes = load_adapter(tmp_path / "a", spec)
    assert found == lora and equal(arrays, parameters) and notes == ()


@pytest.mark.parametrize("format", ["mlx", "peft"])
@on_mlx
def test_without_what_qlab_adds_the_same_adapter_comes_back(format, tmp_path):
    module, spec = tiny()
    for n, lora in enumerate(LORAS):
        folder = tmp_path / str(n)
        parameters = stirred(module, spec, lora)
        save_adapter(folder, parameters, lora, spec, "base", format=format)
        file = folder / "adapter_config.json"
        file.write_text(
            json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "qlab"})
        )
        if format == "peft":
            weights = folder / "adapter_model.safetensors"
            mx.save_safetensors(
                str(weights),
                {k: mx.array(v) for k, v in mx.load(str(weights)).items()},
                {"format": "pt"},
            )
        found, arrays, _ = load_adapter(folder, spec)
        assert found.targets(spec) == lora.targets(spec) and equal(arrays, parameters)
        assert (found.kind, found.rank, found.dtype) == (lora.kind, lora.rank, lora.dtype)
        assert found.scale == pytest.approx(lora.scale) and found.dropout == lora.dropout


@on_mlx
def test_a_kind_made_in_a_cell_is_kept_by_qlab_and_known_to_no_other(monkeypatch, tmp_path):
    from qlab import registry
    from qlab.adapters.lora import LoRA

    class Other(LoRA):
        name = "other"

    monkeypatch.setitem(registry.shelf("adapters"), "other", Other())
    module, spec = tiny()
    lora = LoRAConfig(rank=2, kind="other")
    parameters = stirred(module, spec, lora)
    assert "it has no kind 'other'" in save_adapter(tmp_path / "a", parameters, lora, spec, "base")
    assert load_adapter(tmp_path / "a", spec)[0] == lora
    with pytest.raises(ConfigError, match="PEFT has no kind 'other'"):
        save_adapter(tmp_path / "b", parameters, lora, spec, "base", format="peft")


@on_mlx
def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    module, spec = tiny()
    lora = LoRAConfig(rank=2)
    parameters = stirred(module, spec, lora)
    target = tmp_path / "deep" / "a"
    save_adapter(target, parameters, lora, spec, "base")
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    bad = {path: array * mx.inf for path, array in parameters.items()}
    for wrong, error in [
        ((bad, lora), WeightsError),
        ((parameters, LoRAConfig(rank=4)), ConfigError),
    ]:
        with pytest.raises(error):
            save_adapter(target, *wrong, spec, "base")
    with pytest.raises(ConfigError, match="choose one of mlx, peft.*Did you mean 'peft'"):
        save_adapter(target, parameters, lora, spec, "base", format="pefft")

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mlx.core.save_safetensors", full)
        with pytest.raises(SaveError, match="No space left.*GB are free"):
            save_adapter(target, parameters, lora, spec, "base")
    renames = []

    def second(self, to):
        renames.append(to)
        return full() if len(renames) == 2 else os.rename(self, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", second)
        with pytest.raises(SaveError):
            save_adapter(target, parameters, lora, spec, "base")
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before and os.listdir(
        target.parent
    ) == ["a"]


@on_mlx
def test_a_folder_with_other_files_is_never_replaced(tmp_path):
    module, spec = tiny()
    lora = LoRAConfig(rank=2)
    parameters = stirred(module, spec, lora)
    (tmp_path / "a").mkdir()
    save_adapter(tmp_path / "a", parameters, lora, spec, "base")
    (tmp_path / "a" / "thesis.tex").write_text("x")
    with pytest.raises(SaveError, match=r"other files too \(thesis.tex\)"):
        save_adapter(tmp_path / "a", parameters, lora, spec, "base")
    with pytest.raises(SaveError, match="is a file"):
        save_adapter(tmp_path / "a" / "thesis.tex", parameters, lora, spec, "base")
    assert load_adapter(tmp_path / "a", spec)[0] == lora
