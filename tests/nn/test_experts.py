"""The experts of a mixture in every storage, and adapters on them: against mlx-lm's own layers and against weights written down."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.lora import LoRASwitchLinear

import qlab
from qlab import registry
from qlab.core.config.quant import QuantConfig
from qlab.core.config.quant import QuantPlan
from qlab.core.config.lora import LoRAConfig
from qlab.engine.io.save import open_packed
from qlab.engine.quantize.quantize import quantized_layer
from qlab.engine.io.save import save
from qlab.nn.experts import FrozenExperts
from qlab.nn.experts import PackedExperts
from qlab.nn.linear import weight_of
from qlab.engine.models.skeleton import describe
from tests.tiny import dense, on_mlx, quantized, settings, tiny

EXPERTS, OUT, WIDTH, RANK = 6, 48, 64, 4
KINDS = list(registry.shelf("adapters"))
STORAGES = [
    None,
    *(QuantConfig(name) for name in registry.shelf("schemes")),
    QuantConfig("affine", 3),
]
PACKED = [config for config in STORAGES if config and config.scheme.stock_mode is None]
TOKENS = mx.array([[5, 10, 7, 90, 33, 2], [1, 2, 3, 4, 5, 6]])


def label(config: QuantConfig | None) -> str:
    return config.label.replace(" ", "-") if config else "16-bit"


def experts(storage: QuantConfig | None, bias: bool = True) -> SwitchLinear:
    mx.random.seed(3)
    layer = SwitchLinear(WIDTH, OUT, EXPERTS, bias=bias)
    if bias:
        layer.bias = mx.random.normal((EXPERTS, OUT))
    return quantized_layer(layer, "x", storage, "rtn", None) if storage else layer


def routings() -> dict[str, tuple[mx.array, mx.array, bool]]:
    """Inputs, experts and whether they ascend, as mlx-lm calls its layers: a row for several experts, and sorted rows."""
    x = mx.random.normal((2, 5, 1, 1, WIDTH), key=mx.random.key(1))
    rows = mx.random.normal((40, 1, WIDTH), key=mx.random.key(2))
    return {
        "several experts a row": (
            x,
            mx.random.randint(0, EXPERTS, (2, 5, 3), key=mx.random.key(3)),
            False,
        ),
        "sorted": (rows, mx.sort(mx.random.randint(0, EXPERTS, (40,), key=mx.random.key(4))), True),
        "a single token": (x[:1, :1], mx.array([[[4, 1]]]), False),
        "an expert a group": (
            mx.random.normal((2, 3, EXPERTS, 2, WIDTH), key=mx.random.key(5)),
            mx.arange(EXPERTS),
            False,
        ),
    }


ROUTINGS = list(routings())


def written(x: mx.array, weight: mx.array, indices: mx.array, bias: mx.array | None) -> mx.array:
    """The product written down: every row with a weight of its own."""
    y = x @ weight[indices].swapaxes(-1, -2)
    return y if bias is None else y + bias[indices][..., None, :]


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("storage", PACKED, ids=label)
@on_mlx
def test_packed_experts_give_the_product_and_the_slope_of_their_dense_weight(
    storage, keep, routing
):
    layer, (x, indices, ascending) = experts(storage), routings()[routing]
    assert isinstance(layer, PackedExperts) and layer.shape == (EXPERTS, OUT, WIDTH)
    run = FrozenExperts(layer, None, True, keep)
    ways = [
        lambda x: run(x, indices, sorted_indices=ascending),
        lambda x: written(x, weight_of(layer, mx.float32), indices, layer.bias),
    ]
    found, expected = (
        mx.value_and_grad(lambda x, way=way: mx.sin(way(x)).sum())(x) for way in ways
    )
    assert found[1].shape == x.shape
    assert mx.allclose(found[0], expected[0], rtol=1e-4, atol=1e-4) and mx.allclose(
        found[1], expected[1], rtol=1e-4, atol=1e-4
    )


@on_mlx
def test_packed_experts_keep_no_dense_weight_for_the_way_back():
    mx.random.seed(4)
    layers = [
        quantized_layer(SwitchLinear(256, 256, 8, bias=False), "x", QuantConfig("nf4"), "rtn", None)
        for _ in range(12)
    ]
    x, indices = mx.random.normal((64, 1, 256)), mx.sort(mx.random.randint(0, 8, (64,)))

    def run(x: mx.array) -> mx.array:
        for layer in layers:
            x = mx.tanh(layer(x, indices, sorted_indices=True) * 3)
        return x.sum()

    mx.eval(x, indices)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(mx.grad(run)(x))
    assert mx.get_peak_memory() - before < 12 * 8 * 256 * 256 * 4 / 1.4


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("storage", [config for config in STORAGES if config], ids=label)
@on_mlx
def test_a_mixture_in_every_storage_says_what_its_dense_numbers_say(storage, name):
    module, spec = tiny(name)
    small, plain = quantized(module, spec, storage), dense(module, spec, storage, name)
    before, after = spec.layers, describe(small, "x").layers
    assert [(x.path, x.kind, x.shape) for x in after] == [(x.path, x.kind, x.shape) for x in before]
    assert len({x.storage_label for x in after}) == 1 and any(x.kind == "switch" for x in after)
    assert mx.allclose(small(TOKENS), plain(TOKENS), rtol=1e-3, atol=2e-3)


# --- adapters ---------------------------------------------------------------------------------------------------------


def made(kind: str, layer: SwitchLinear, **settings):
    config = LoRAConfig(kind=kind, **{"rank": RANK, "scale": 0.7, **settings})
    adapter = config.adapter_kind.make(
        FrozenExperts(layer, None, True), (EXPERTS, OUT, WIDTH), config
    )
    adapter.freeze()
    adapter.unfreeze(
        keys=list(config.adapter_kind.shapes((EXPERTS, OUT, WIDTH), RANK)), recurse=False
    )
    return adapter


def stir(adapter, kind: str) -> None:
    for number, (name, shape) in enumerate(
        registry.get("adapters", kind).shapes((EXPERTS, OUT, WIDTH), RANK).items()
    ):
        drawn = mx.random.normal(shape, key=mx.random.key(number)) * 0.3
        adapter[name] = adapter.m * (1 + drawn) if name == "m" else drawn


def changed(
    adapter, kind: str, parameters: dict[str, mx.array], constant: bool = False
) -> mx.array:
    """The weight that an adapter stands for."""
    whole = adapter.base.dense(mx.float32) + 0.7 * parameters["lora_b"] @ parameters["lora_a"]
    if kind == "lora":
        return whole
    norm = mx.linalg.norm(whole, axis=-1, keepdims=True)
    return parameters["m"][..., None] * whole / (mx.stop_gradient(norm) if constant else norm)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("kind", KINDS)
@on_mlx
def test_declared_shapes_are_those_of_the_trainable_parameters(kind, dropout):
    found = {
        name: array.shape
        for name, array in tree_flatten(
            made(kind, experts(None), dropout=dropout).trainable_parameters()
        )
    }
    declared = registry.get("adapters", kind).shapes((EXPERTS, OUT, WIDTH), RANK)
    assert found == declared
    theirs = LoRASwitchLinear(WIDTH, OUT, EXPERTS, r=RANK)
    assert {name: found[name] for name in ("lora_a", "lora_b")} == {
        name: theirs[name].shape for name in ("lora_a", "lora_b")
    }


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("storage", STORAGES, ids=label)
@pytest.mark.parametrize("kind", KINDS)
@on_mlx
def test_it_has_no_effect_at_first_and_is_the_product_with_the_changed_weight_later(
    kind, storage, routing
):
    layer, (x, indices, ascending) = experts(storage), routings()[routing]
    adapter = made(kind, layer)
    assert mx.array_equal(
        adapter(x, indices, sorted_indices=ascending), layer(x, indices, sorted_indices=ascending)
    )
    stir(adapter, kind)
    expected = written(x, changed(adapter, kind, dict(adapter)), indices, layer.bias)
    assert mx.allclose(
        adapter(x, indices, sorted_indices=ascending), expected, rtol=1e-3, atol=2e-3
    )


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("storage", [None, QuantConfig("affine"), QuantConfig("nf4")], ids=label)
@pytest.mark.parametrize("kind", KINDS)
@on_mlx
def test_gradients_are_those_of_the_changed_weight_whose_norm_is_a_constant(
    kind, storage, bias, routing
):
    layer, (x, indices, ascending) = experts(storage, bias), routings()[routing]
    adapter = made(kind, layer)
    stir(adapter, kind)
    parameters = dict(tree_flatten(adapter.trainable_parameters()))

    def ours(parameters: dict[str, mx.array], x: mx.array) -> mx.array:
        adapter.update(parameters)
        return mx.sin(adapter(x, indices, sorted_indices=ascending)).sum()

    def by_hand(parameters: dict[str, mx.array], x: mx.array) -> mx.array:
        return mx.sin(
            written(
                x, changed(adapter, kind, parameters, True), indices, layer.bias if bias else None
            )
        ).sum()

    found, expected = (mx.grad(f, argnums=(0, 1))(parameters, x) for f in (ours, by_hand))
    assert mx.allclose(found[1], expected[1], rtol=1e-3, atol=2e-3)
    for name in parameters:
        size = mx.linalg.norm(expected[0][name]).item()
        assert mx.linalg.norm(found[0][name] - expected[0][name]).item() < 1e-3 * size, name


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(
    "storage", [x for x in STORAGES if x is None or x.scheme.stock_mode], ids=label
)
@on_mlx
def test_lora_gives_the_output_and_the_gradients_of_mlx_lms_own_layer(storage, routing):
    layer, (x, indices, ascending) = experts(storage), routings()[routing]
    adapter, theirs = made("lora", layer), LoRASwitchLinear.from_base(layer, r=RANK, scale=0.7)
    stir(adapter, "lora")
    parameters = {name: adapter[name] for name in ("lora_a", "lora_b")}

    def run(module, parameters: dict[str, mx.array], x: mx.array) -> mx.array:
        module.update(parameters)
        return module(x, indices, sorted_indices=ascending)

    found, expected = (run(module, parameters, x) for module in (adapter, theirs))
    assert mx.allclose(found, expected, rtol=1e-5, atol=1e-5)
    found, expected = (
        mx.grad(lambda p, x, m=m: mx.sin(run(m, p, x)).sum(), argnums=(0, 1))(parameters, x)
        for m in (adapter, theirs)
    )
    assert mx.allclose(found[1], expected[1], rtol=1e-5, atol=1e-5)
    assert all(
        mx.allclose(found[0][name], expected[0][name], rtol=1e-5, atol=1e-5) for name in parameters
    )


@pytest.mark.parametrize("factors", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@on_mlx
def test_activations_keep_their_dtype_whatever_the_factors_have(kind, dtype, factors):
    x, indices, ascending = routings()["sorted"]
    adapter = made(kind, experts(QuantConfig("nf4"), bias=False), dtype=factors, dropout=0.5)
    assert adapter(x.astype(dtype), indices, sorted_indices=ascending).dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
@on_mlx
def test_dropout_follows_its_key_and_training_mode(kind):
    x, indices, ascending = routings()["sorted"]
    adapter = made(kind, experts(None), dropout=0.5)
    stir(adapter, kind)

    def run(key: int) -> np.ndarray:
        adapter.dropout_key = mx.random.key(key)
        return np.array(adapter(x, indices, sorted_indices=ascending))

    assert np.array_equal(run(1), run(1)) and np.abs(run(1) - run(2)).max() > 0.1
    adapter.eval()
    assert np.array_equal(run(1), run(2))


@on_mlx
def test_the_first_factor_is_drawn_within_the_bound_of_the_experts_width():
    adapter = made("lora", experts(None))
    assert 0.9 / 8 < mx.abs(adapter.lora_a).max().item() <= 1 / 8  # 1 / √64
    assert not mx.array_equal(adapter.lora_a[0], adapter.lora_a[1])


@pytest.mark.parametrize("storage", PACKED, ids=label)
def test_a_folder_of_packed_experts_opens_bit_for_bit(storage, tmp_path):
    demo = qlab.load("demo")
    module, spec = tiny("gpt_oss")
    small = quantized(module, spec, storage)

    @on_mlx
    def check():
        said = save(tmp_path / "m", small, demo.tokenizer, settings("gpt_oss"), QuantPlan(storage))
        assert "qlab.load" in said
        facts = json.loads((tmp_path / "m" / "config.json").read_text())
        assert facts["qlab"]["layers"]["model.layers.0.mlp.experts.up_proj"]["kind"] == "switch"
        back = open_packed(tmp_path / "m", facts)
        assert mx.array_equal(back(TOKENS), small(TOKENS))
        assert describe(back, "x").layers == describe(small, "x").layers

    check()
