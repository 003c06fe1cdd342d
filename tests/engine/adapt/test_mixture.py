"""An adapter on a mixture of experts, from the start over the step to files and fused models."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import qlab
from qlab.core.config.quant import QuantConfig
from qlab.core.config.quant import QuantPlan
from qlab.core.memory.setup import Setup
from qlab.core.config.lora import LoRAConfig
from qlab.core.config.train import TrainConfig
from qlab.engine.adapt.attach import twin_with
from qlab.engine.adapt.files import load_adapter
from qlab.engine.adapt.files import save_adapter
from qlab.engine.adapt.targets import mlx_targets
from qlab.runtime.device import backend
from qlab.engine.quantize.quantize import quantize
from qlab.engine.io.save import save
from qlab.engine.adapt.fuse import fuse
from qlab.engine.adapt.preview import preview
import qlab.views  # noqa: F401  # reports show themselves
from qlab.engine.adapt.activations import passing
from qlab.runtime.job import mlx_call
from qlab.nn.linear import weight_of
from qlab.engine.models.skeleton import describe
from qlab.engine.models.skeleton import skeleton
from qlab.engine.adapt.directions import STARTS
from qlab.engine.adapt.directions import directions
from qlab.engine.adapt.recovery import recovery
from qlab.engine.adapt.init import start
from qlab.nn.frozen import Compute
from qlab.engine.models.surgery import cast
from qlab.engine.models.surgery import module_at
from qlab.errors import ConfigError
from tests.engine.adapt.test_files import stirred as written
from tests.engine.adapt.test_fuse import done, far, stirred
from tests.engine.step.test_whole import assert_same
from tests.engine.step.test_blockwise import both
from tests.engine.memory.test_whole_step import assert_close
from tests.tiny import on_mlx, quantized, settings, tiny

MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss")
TOKENS = mx.array([[5, 10, 7, 90, 33, 2]])
STORAGES = [None, QuantConfig("affine", 4, 32), QuantConfig("mxfp4"), QuantConfig("nf4", 4, 32)]
UP = "model.layers.1.block_sparse_moe.switch_mlp.up_proj"


def label(config: QuantConfig | None) -> str:
    return config.mode if config else "16-bit"


@on_mlx
def mixture(name: str = "mixtral", storage: QuantConfig | None = None):
    module, spec = tiny(name)
    module = quantized(module, spec, storage)
    return module, describe(module, "tiny")


# --- the step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("storage", STORAGES, ids=label)
@pytest.mark.parametrize("name", MIXTURES)
@on_mlx
def test_a_block_at_a_time_gives_the_numbers_of_the_whole_graph(name, storage, kind):
    module, spec = mixture(name, storage)
    lora = LoRAConfig(rank=4, kind=kind, dropout=0.1)
    found, expected, step = both(module, spec, lora, key=mx.random.key(3))
    assert_same(found, expected, 1e-4)
    assert step.how == "stepped" and step.traces <= 8  # mxfp4 embeds in another dtype
    assert sum(array.ndim == 3 for array in step.parameters.values()) == 3 * 3 * 2


@pytest.mark.parametrize("kind", ["lora", "dora"])
@on_mlx
def test_the_same_on_a_base_of_mixed_precision(kind):
    module, spec = mixture()
    mixed = {
        "model.layers.0.block_sparse_moe.switch_mlp.up_proj": None,
        UP: QuantConfig("nf4"),
        "lm_head": QuantConfig("mxfp8"),
    }
    module = done(quantize(module, spec, QuantPlan(QuantConfig("affine", 4, 32), mixed), "rtn", {}))
    spec = describe(module, "tiny")
    assert len({layer.storage_label for layer in spec.layers}) == 4
    found, expected, step = both(module, spec, LoRAConfig(rank=4, kind=kind))
    assert_same(found, expected)
    assert step.how == "stepped"


@pytest.mark.parametrize(
    "keys",
    ["*.2.*.down_proj", ("*.switch_mlp.up_proj", "lm_head"), "switch_mlp.gate_proj"],
    ids=str,
)
@on_mlx
def test_the_same_with_adapters_on_some_experts_only(keys):
    module, spec = mixture()
    found, expected, _ = both(module, spec, LoRAConfig(rank=4, keys=keys))
    assert_same(found, expected)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@on_mlx
def test_in_16_bits_the_numbers_are_near_those_of_float32(kind):
    if backend() == "cpu":
        pytest.skip("MLX's products of experts are float32 only on a CPU")
    module, spec = tiny("mixtral", torch_dtype="bfloat16")
    lora = LoRAConfig(rank=4, kind=kind, keys="*.switch_mlp.*")
    given = mx.random.randint(0, 97, (2, 40), key=mx.random.key(1)), mx.ones((2, 40), mx.int32)
    coarse, fine = (
        both(module, spec, lora, compute=Compute(dtype, True), given=given)[0]
        for dtype in (None, mx.float32)
    )
    assert coarse.loss.item() == pytest.approx(fine.loss.item(), rel=0.02)
    assert coarse.grads.keys() == fine.grads.keys() and len(fine.grads) == 9 * (
        2 if kind == "lora" else 3
    )


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "storage",
    [None, QuantConfig("affine", 4, 32), QuantConfig("mxfp4"), QuantConfig("affine", 3, 32)],
    ids=str,
)
def test_stock_mlx_lm_opens_the_adapter_with_the_same_logits(storage, tmp_path):
    tokenizer = qlab.load("demo").tokenizer
    module, spec = mixture("qwen3_moe", storage)
    plan = QuantPlan(storage) if storage else None
    lora = LoRAConfig(rank=4, num_layers=2, scale=3.0)

    def ours():
        said = save(tmp_path / "base", module, tokenizer, settings("qwen3_moe"), plan)
        parameters = written(module, spec, lora)
        note = save_adapter(tmp_path / "a", parameters, lora, spec, str(tmp_path / "base"))
        assert said.startswith("Saved as an mlx-lm folder") and note.startswith(
            "Saved in mlx-lm's layout; mlx_lm.load"
        )
        return np.array(twin_with(module, spec, lora, parameters)(TOKENS)), np.array(module(TOKENS))

    def stock():
        import mlx_lm

        made, _ = mlx_lm.load(str(tmp_path / "base"), adapter_path=str(tmp_path / "a"))
        return np.array(cast(made, mx.float32)(TOKENS))

    (wanted, plain), got = mlx_call(ours), mlx_call(stock)
    assert (
        np.abs(got - wanted).max()
        < 1e-3 * wanted.std()
        < 0.1 * wanted.std()
        < np.abs(plain - wanted).max()
    )


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("keys", [None, "*.up_proj", ("q_proj", "*.1.*.down_proj")], ids=str)
@on_mlx
def test_mlx_lm_adapts_exactly_the_layers_of_the_adapter(name, keys):
    from mlx_lm.tuner.utils import linear_to_lora_layers

    _, spec = tiny(name)
    for num_layers in (-1, 2):
        lora = LoRAConfig(rank=2, keys=keys, num_layers=num_layers)
        words = [mlx_targets(lora, spec)]
        if keys is None:
            words.append((num_layers, None))  # without keys both mean the same layers
        for count, said in words:
            module = skeleton(settings(name))
            linear_to_lora_layers(
                module, count, {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": said}
            )
            found = {path for path, leaf in module.named_modules() if "lora_a" in leaf}
            assert found == {layer.path for layer in lora.targets(spec)}


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("storage", STORAGES, ids=label)
@on_mlx
def test_what_was_written_comes_back_bit_for_bit(storage, kind, tmp_path):
    module, spec = mixture(storage=storage)
    lora = LoRAConfig(rank=4, kind=kind, keys=("all-linear", "lm_head"), dtype="bfloat16")
    parameters = written(module, spec, lora)
    note = save_adapter(tmp_path / "a", parameters, lora, spec, "base")
    assert ("cannot open it" in note) == (kind == "dora" or storage == STORAGES[-1])
    if kind == "dora" and storage != STORAGES[-1]:
        assert "no DoRA of experts" in note and "kind='lora' is the nearest" in note
    found, arrays, notes = load_adapter(tmp_path / "a", spec)
    assert found == lora and notes == () and arrays.keys() == parameters.keys()
    assert all(mx.array_equal(arrays[path], parameters[path]) for path in arrays)


@on_mlx
def test_peft_is_refused_with_the_reason(tmp_path):
    module, spec = mixture()
    lora = LoRAConfig(rank=2)
    with pytest.raises(
        ConfigError,
        match="experts 'model.layers.0.*': they are parts of larger tensors there; use format='mlx'",
    ):
        save_adapter(tmp_path / "a", written(module, spec, lora), lora, spec, "base", format="peft")
    rest = LoRAConfig(rank=2, keys="*.self_attn.*")
    save_adapter(tmp_path / "b", written(module, spec, rest), rest, spec, "base", format="peft")
    assert load_adapter(tmp_path / "b", spec)[0].targets(spec) == rest.targets(spec)
    assert not (tmp_path / "a").exists()


# --- fused ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize(
    "storage", [x for x in STORAGES if label(x) != "mxfp4"], ids=label
)  # its router flips in bfloat16
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@on_mlx
def test_fused_dense_the_model_says_what_it_says_with_the_adapter_beside_it(name, storage, kind):
    module, spec = mixture(name, storage)
    lora = LoRAConfig(rank=4, kind=kind, keys="*_proj")
    parameters = stirred(module, spec, lora)
    wanted = twin_with(module, spec, lora, parameters)(TOKENS)
    made = done(fuse(module, spec, parameters, lora))
    assert far(made(TOKENS), wanted) < 2e-3 < 0.1 < far(module(TOKENS), wanted)
    assert all("scales" not in module_at(made, layer.path) for layer in lora.targets(spec))


@pytest.mark.parametrize("bits", [8, "base"])
@pytest.mark.parametrize("storage", STORAGES[1:], ids=label)
@on_mlx
def test_fused_experts_are_stored_as_asked(storage, bits):
    module, spec = mixture(storage=storage)
    lora = LoRAConfig(rank=4, keys="*.switch_mlp.*")
    made = done(fuse(module, spec, stirred(module, spec, lora), lora, bits=bits))
    found = {layer.storage_label for layer in describe(made, "x").layers if layer.kind == "switch"}
    assert (
        found == {"affine 8-bit g64" if bits == 8 else storage.label}
        and np.isfinite(np.array(made(TOKENS))).all()
    )


@on_mlx
def test_the_preview_finds_what_rounding_takes_from_every_expert(monkeypatch):
    first, _ = mixture()
    module, spec = mixture(storage=QuantConfig("affine", 4, 32))
    lora = LoRAConfig(rank=4, keys="*.switch_mlp.*")
    parameters = stirred(module, spec, lora, 0.02)
    parameters[f"{UP}.lora_b"][1] = 0  # one expert was never reached, and one hardly
    parameters[f"{UP}.lora_b"][2] *= 0.05
    mx.eval(parameters)
    monkeypatch.setattr("qlab.engine.adapt.preview._SAMPLE", 2**12)
    some, whole = (
        done(preview(module, spec, parameters, lora, first, exact=exact)) for exact in (False, True)
    )
    assert {x.depth for x in some.layers} == {"sampled"} and {x.depth for x in whole.layers} == {
        "exact"
    }
    layer = next(x for x in whole.layers if x.path == UP)
    base = weight_of(module_at(module, UP), mx.float32)
    delta = lora.scale * parameters[f"{UP}.lora_b"] @ parameters[f"{UP}.lora_a"]
    config = QuantConfig("affine", 4, 32)
    before, after = (
        config.scheme.dequantize(config.scheme.quantize(w, config), config, mx.float32)
        for w in (base, base + delta)
    )
    assert layer.delta_norm == pytest.approx(mx.linalg.norm(delta).item(), rel=1e-4)
    assert layer.kept_base == pytest.approx(
        ((after - before) * delta).sum().item() / mx.square(delta).sum().item(), abs=1e-3
    )
    assert layer.kept_base < 0.9 < layer.kept_16
    moved = [
        ((after - before)[e] * delta[e]).sum().item() / mx.square(delta[e]).sum().item()
        for e in (0, 2, 3)
    ]
    assert (
        layer.kept_base_least == pytest.approx(min(moved), abs=1e-3)
        and f"an expert {min(moved):.3f}" in whole._repr_html_()
    )
    assert some.retained("base") == pytest.approx(whole.retained("base"), abs=0.1)


# --- starts -----------------------------------------------------------------------------------------------------------


def rows() -> list[mx.array]:
    return [mx.random.randint(0, 97, (1, 40), key=mx.random.key(n)) for n in range(6)]


def weights(module):
    return lambda path: weight_of(module_at(module, path))


@pytest.mark.parametrize("name", MIXTURES)
@on_mlx
def test_every_expert_is_given_the_rows_that_went_to_it(name):
    module, spec = mixture(name)
    layers = [x for x in spec.layers if x.kind == "switch"]
    texts = [*rows(), mx.array([[1, 2, 3]])]  # many rows are sorted, few are not
    groups = list(passing(module, [x.path for x in layers], texts[:6], texts[6:]))
    found = {path: inputs for group in groups for path, inputs in group.items()}
    assert found.keys() == {x.path for x in layers}
    for layer in layers:
        count, width = layer.shape[0], layer.shape[-1]
        assert sum(len(own.seen) for own in found[layer.path].values()) == 6 * 40 * 2
        assert sum(len(own.heldout) for own in found[layer.path].values()) <= 3 * 2
        assert all(
            0 <= expert < count and own.seen.shape[1] == width
            for expert, own in found[layer.path].items()
        )
    up, gate, down = (
        next(x.path for x in layers if x.path.endswith(name))
        for name in ("up_proj", "gate_proj", "down_proj")
    )
    assert found[up] is found[gate]
    if (
        name == "mixtral"
    ):  # what goes into the last product of an expert follows from what went into its first two
        for expert, own in found[up].items():
            a, b = (own.seen @ weight_of(module_at(module, path))[expert].T for path in (gate, up))
            assert mx.allclose(
                a * mx.sigmoid(a) * b, found[down][expert].seen, rtol=1e-3, atol=1e-4
            )


@on_mlx
def test_rows_that_share_their_experts_are_given_to_each():
    from mlx_lm.models.switch_layers import SwitchLinear

    class Grouped(
        nn.Module
    ):  # as the output of DeepSeek's attention: group g of every token goes to expert g
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(97, 3 * 8), SwitchLinear(8, 5, 3)

        def __call__(self, tokens: mx.array) -> mx.array:
            return self.out(self.embed(tokens).reshape(*tokens.shape, 3, 1, 8), mx.arange(3))

    model, texts = Grouped(), rows()
    (found,) = passing(model, ["out"], texts[:4], texts[4:])
    expected = model.embed(mx.concatenate(texts[:4], 1)).reshape(-1, 3, 8)
    assert found["out"].keys() == {0, 1, 2}
    assert all(mx.array_equal(own.seen, expected[:, group]) for group, own in found["out"].items())


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("init", STARTS)
def test_a_start_brings_every_expert_nearer_to_its_original(init, kind):
    (module, spec), (small, _) = mixture(), mixture(storage=QuantConfig("affine", 2, 32))
    lora = LoRAConfig(rank=8, init=init, kind=kind, scale=-0.5, keys="*_proj")

    @on_mlx
    def check():
        layers, texts = lora.targets(spec), rows()
        passed = passing(module, [x.path for x in layers], texts[:5], texts[5:])
        arrays = done(start(lora, layers, weights(module), weights(small), passed))
        error = weights(module)(UP) - weights(small)(UP)
        change = lora.scale * arrays[f"{UP}.lora_b"] @ arrays[f"{UP}.lora_a"]
        if init == "residual":
            for own, made in zip(error, change, strict=True):
                squares = np.linalg.svd(np.array(own), compute_uv=False) ** 2
                assert mx.square(own - made).sum().item() == pytest.approx(
                    squares[8:].sum(), rel=1e-2
                )
        if kind == "dora":
            assert mx.allclose(
                arrays[f"{UP}.m"], mx.linalg.norm(weights(module)(UP), axis=-1), rtol=1e-5
            )
        made = twin_with(small, spec, lora, arrays)
        distances = [mx.square(m(texts[5]) - module(texts[5])).sum().item() for m in (made, small)]
        assert distances[0] < distances[1]

    check()


@on_mlx
def test_recovered_shares_are_those_of_all_experts_errors_together():
    (module, _), (small, _) = mixture(), mixture(storage=QuantConfig("affine", 2, 32))
    texts = rows()
    inputs = {
        k: v for group in passing(module, [UP], texts[:5], texts[5:]) for k, v in group.items()
    }[UP]
    found = recovery(UP, weights(module), weights(small), inputs)
    errors = weights(module)(UP) - weights(small)(UP)
    squares = np.array([np.linalg.svd(np.array(own), compute_uv=False) ** 2 for own in errors])
    assert found.share(8) == pytest.approx(squares[:, :8].sum() / squares.sum(), rel=1e-3)
    assert found.relative_error == pytest.approx(
        np.linalg.norm(errors) / np.linalg.norm(weights(module)(UP)), rel=1e-3
    )
    left = total = 0.0
    for expert, own in inputs.items():
        vectors = directions("qera", errors[expert], own, 64)[0][:, :8]
        wrong = errors[expert] @ own.heldout.T
        left += mx.square(wrong - vectors @ (vectors.T @ wrong)).sum().item()
        total += mx.square(wrong).sum().item()
    assert found.share(8, "qera") == pytest.approx(1 - left / total, abs=1e-3)


@on_mlx
def test_eight_experts_that_have_an_error_speak_for_all():
    weight = mx.random.normal((40, 24, 16), key=mx.random.key(1))
    stored = (
        weight
        + 0.1
        * mx.random.normal(weight.shape, key=mx.random.key(2))
        * (mx.arange(40) % 2)[:, None, None]
    )
    found = recovery("x", lambda _: weight, lambda _: stored, None)
    squares = np.array(
        [np.linalg.svd(np.array(own), compute_uv=False) ** 2 for own in (weight - stored)[1::2]]
    )
    assert found.share(4) == pytest.approx(squares[:, :4].sum() / squares.sum(), rel=0.05)
    assert found.relative_error == pytest.approx(
        np.linalg.norm(stored - weight) / np.linalg.norm(weight), rel=1e-4
    )
    assert recovery("x", lambda _: weight, lambda _: weight, None) is None


@on_mlx
def test_a_layer_that_is_not_quantized_starts_without_effect_and_can_learn():
    module, spec = mixture()
    lora = LoRAConfig(rank=4, init="residual", keys=("up_proj", "q_proj", "down_proj", "lm_head"))
    arrays = done(start(lora, lora.targets(spec), weights(module), weights(module), ()))
    assert mx.allclose(twin_with(module, spec, lora, arrays)(TOKENS), module(TOKENS), atol=1e-5)
    assert all(mx.isfinite(array).all() for array in arrays.values())
    for layer in lora.targets(spec):
        assert any(mx.any(arrays[f"{layer.path}.{name}"]) for name in ("lora_a", "lora_b"))


QWEN3_30B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "intermediate_size": 6144,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "rope_theta": 1e6,
    "max_position_embeddings": 40960,
    "torch_dtype": "bfloat16",
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}


@pytest.mark.parametrize(
    "keys, size, peak", [(None, 422_756_352, 29.0), ("*.self_attn.*", 6_684_672, 20.6)], ids=str
)
def test_figures_of_the_guide(keys, size, peak):
    train = qlab.TrainConfig(batch_size=1, max_seq_length=2048, grad_checkpoint=True)
    found = qlab.estimate(QWEN3_30B, QuantConfig(), LoRAConfig(rank=8, keys=keys), train)
    assert found.parts["adapter"] == 4 * size and found.parts["optimizer"] == 8 * size
    if backend() == "cpu":
        assert found.total_nbytes / 1e9 == pytest.approx(peak, rel=0.02)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("checkpoint", [True, False], ids=["stepped", "whole"])
@pytest.mark.parametrize("storage", STORAGES, ids=label)
@on_mlx
def test_a_traced_step_needs_what_the_real_step_needs(storage, kind, checkpoint):
    module, spec = tiny("mixtral", num_local_experts=8)
    train = TrainConfig(
        batch_size=3, max_seq_length=300, loss_chunk=256, grad_checkpoint=checkpoint
    )
    lora = LoRAConfig(rank=4, kind=kind, keys="*.switch_mlp.*")
    assert_close(module, spec, Setup(QuantPlan(storage) if storage else None, lora, train), storage)
