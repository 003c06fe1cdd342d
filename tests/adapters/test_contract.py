"""What every kind of adapter on the shelf must do: a new file is tested by standing there."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from qlab import registry
from qlab.core.config.quant import QuantConfig
from qlab.core.config.lora import LoRAConfig
from qlab.core.config.train import TrainConfig
from qlab.engine.quantize.quantize import quantized_layer
from qlab.nn.frozen import Frozen
from qlab.nn.frozen import Compute
from qlab.engine.adapt.attach import attach
from qlab.engine.step.choose import make_step
from qlab.engine.models.surgery import module_at
from qlab.engine.step.protocol import StepBatch
from tests.tiny import on_mlx, quantized, tiny

KINDS = list(registry.shelf("adapters"))
OUT, WIDTH = 48, 64
STORAGES = [None, QuantConfig("affine"), QuantConfig("mxfp4"), QuantConfig("nf4")]


def label(value) -> str:
    return value.mode if isinstance(value, QuantConfig) else str(value)


def base(storage: QuantConfig | None = None, bias: bool = True, dequantize: bool = True) -> Frozen:
    mx.random.seed(3)
    layer = nn.Linear(WIDTH, OUT, bias=bias)
    if storage:
        layer = quantized_layer(layer, "x", storage, "rtn", None)
    return Frozen(layer, None, dequantize)


def made(kind: str, on: Frozen | None = None, **settings) -> nn.Module:
    config = LoRAConfig(kind=kind, **{"rank": 4, **settings})
    return config.adapter_kind.make(on or base(), (OUT, WIDTH), config)


def stir(adapter: nn.Module, kind: str) -> None:
    """Give every trainable array random values, so that the adapter has an effect."""
    for number, (name, shape) in enumerate(
        registry.get("adapters", kind).shapes((OUT, WIDTH), 4).items()
    ):
        adapter[name] = mx.random.normal(shape, key=mx.random.key(number)) * 0.3


def inputs(dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal((2, 9, WIDTH), key=mx.random.key(8)).astype(dtype)


@pytest.mark.parametrize("rank", [1, 4, 48])
@pytest.mark.parametrize("kind", KINDS)
@on_mlx
def test_declared_shapes_are_those_of_the_trainable_parameters(kind, rank):
    found = dict(tree_flatten(made(kind, rank=rank).trainable_parameters()))
    declared = registry.get("adapters", kind).shapes((OUT, WIDTH), rank)
    assert {name: array.shape for name, array in found.items()} == declared
    assert registry.get("adapters", kind).size((OUT, WIDTH), rank) == sum(
        array.size for array in found.values()
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
@on_mlx
def test_trainable_parameters_have_the_dtype_asked_for(kind, dtype):
    found = dict(tree_flatten(made(kind, dtype=dtype).trainable_parameters()))
    assert {array.dtype for array in found.values()} == {getattr(mx, dtype)}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("kind", KINDS)
@on_mlx
def test_on_a_model_exactly_what_was_declared_is_trainable(kind, dropout):
    module, spec = tiny()
    lora = LoRAConfig(
        rank=4, kind=kind, dropout=dropout, num_layers=2, keys=("q_proj", "down_proj", "lm_head")
    )
    twin = attach(module, spec, lora, Compute(None, True), False)
    found = {path: array.shape for path, array in tree_flatten(twin.trainable_parameters())}
    declared = {
        f"{layer.path}.{name}": shape
        for layer in lora.targets(spec)
        for name, shape in lora.adapter_kind.shapes(layer.shape, 4).items()
    }
    assert found == declared and len(lora.targets(spec)) == 5
    assert lora.size(spec) == sum(
        array.size for _, array in tree_flatten(twin.trainable_parameters())
    )


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("storage", STORAGES, ids=label)
@pytest.mark.parametrize("kind", KINDS)
@on_mlx
def test_it_has_no_effect_at_first_and_one_later(kind, storage, bias):
    layer = base(storage, bias)
    adapter, x = made(kind, layer), inputs()
    expected = layer(x)
    assert mx.array_equal(adapter(x), expected)
    stir(adapter, kind)
    assert mx.abs(adapter(x) - expected).max().item() > 0.1


@pytest.mark.parametrize("kind", KINDS)
@on_mlx
def test_a_model_with_fresh_adapters_gives_the_models_own_logits(kind):
    module, spec = tiny()
    tokens = mx.arange(20).reshape(2, 10)
    lora = LoRAConfig(rank=4, kind=kind, dropout=0.3)
    assert mx.array_equal(
        attach(module, spec, lora, Compute(None, False), False)(tokens), module(tokens)
    )


@pytest.mark.parametrize("factors", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@on_mlx
def test_activations_keep_their_dtype_whatever_the_factors_have(kind, dtype, factors):
    layer = base(QuantConfig("nf4"), bias=False)
    for dropout in (0.0, 0.5):
        assert made(kind, layer, dtype=factors, dropout=dropout)(inputs(dtype)).dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
@on_mlx
def test_dropout_changes_the_output_in_training_mode_only(kind):
    adapter, plain, x = made(kind, dropout=0.5), made(kind), inputs()
    stir(adapter, kind)
    stir(plain, kind)
    adapter.train()
    assert mx.abs(adapter(x) - plain(x)).max().item() > 0.1
    adapter.eval()
    assert mx.array_equal(adapter(x), plain(x))


@pytest.mark.parametrize("kind", KINDS)
@on_mlx
def test_the_same_key_drops_the_same_inputs_and_another_key_others(kind):
    adapter, x = made(kind, dropout=0.5), inputs()
    stir(adapter, kind)

    def run(key: int) -> mx.array:
        adapter.dropout_key = mx.random.key(key)
        return adapter(x)

    assert mx.array_equal(run(1), run(1))
    assert mx.abs(run(1) - run(2)).max().item() > 0.1


@on_mlx
def test_dropout_keeps_the_mean_and_drops_the_share_asked_for():
    share = 0.3
    adapter, x = (
        made("lora", base(bias=False), rank=1, scale=1.0, dropout=share),
        mx.ones((4000, WIDTH)),
    )
    adapter.lora_a, adapter.lora_b = mx.ones((WIDTH, 1)), mx.ones((1, OUT))
    kept = (adapter(x) - adapter.base(x))[:, 0] * (1 - share)  # inputs that were kept, of each row
    assert kept.mean().item() == pytest.approx(WIDTH * (1 - share), rel=0.01)
    assert mx.var(kept).item() == pytest.approx(WIDTH * share * (1 - share), rel=0.1)
    assert mx.abs(kept - mx.round(kept)).max().item() < 1e-3


@on_mlx
def test_lora_adds_its_scale_times_the_product_of_its_factors():
    layer, x = base(), inputs()
    adapter = made("lora", layer, scale=2.5)
    stir(adapter, "lora")
    weight = layer.layer.weight + 2.5 * (adapter.lora_a @ adapter.lora_b).T
    assert mx.allclose(adapter(x), x @ weight.T + layer.layer.bias, rtol=1e-5, atol=1e-5)


@on_mlx
def test_every_layer_draws_its_own_first_factor_within_the_bound():
    module, spec = tiny()
    twin = attach(module, spec, LoRAConfig(rank=4, keys="q_proj"), Compute(None, True), False)
    drawn = [module_at(twin, f"model.layers.{i}.self_attn.q_proj").lora_a for i in range(3)]
    assert not mx.array_equal(drawn[0], drawn[1]) and not mx.array_equal(drawn[1], drawn[2])
    assert all(0.9 / 8 < mx.abs(a).max().item() <= 1 / 8 for a in drawn)  # 1 / √64


BASES = [
    None,
    *(QuantConfig("affine", bits) for bits in (2, 3, 4, 5, 6, 8)),
    *(QuantConfig(m) for m in ("symmetric", "mxfp4", "mxfp8", "nvfp4", "nf4")),
]


def weight(layer: Frozen, adapter: nn.Module, kind: str, scale: float) -> mx.array:
    """The weight that an adapter stands for, written down as the papers do."""
    changed = layer.dense(mx.float32) + scale * (adapter.lora_a @ adapter.lora_b).T
    return (
        changed
        if kind == "lora"
        else adapter.m[:, None] * changed / mx.linalg.norm(changed, axis=1, keepdims=True)
    )


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dequantize", [True, False], ids=["dequantized", "kernel"])
@pytest.mark.parametrize(
    "storage", BASES, ids=lambda c: c.label.replace(" ", "-") if c else "dense"
)
@pytest.mark.parametrize("kind", KINDS)
@on_mlx
def test_on_every_base_it_is_the_product_with_the_changed_weight(kind, storage, dequantize, bias):
    layer, x = base(storage, bias, dequantize), inputs()
    adapter = made(kind, layer, scale=0.7)
    stir(adapter, kind)
    expected = x @ weight(layer, adapter, kind, 0.7).T + (layer.layer.bias if bias else 0)
    assert mx.allclose(adapter(x), expected, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("storage", [None, QuantConfig("affine", 3), QuantConfig("nf4")], ids=label)
@on_mlx
def test_dora_has_the_gradients_of_a_weight_whose_norm_is_a_constant(storage):
    layer, x = base(storage), inputs()
    adapter = made("dora", layer, scale=0.7)
    stir(adapter, "dora")
    names = ["lora_a", "lora_b", "m"]
    plain = layer.dense(mx.float32)

    def ours(parameters: dict[str, mx.array], x: mx.array) -> mx.array:
        adapter.update(parameters)
        return mx.sin(adapter(x)).sum()

    def written_down(parameters: dict[str, mx.array], x: mx.array) -> mx.array:
        changed = plain + 0.7 * (parameters["lora_a"] @ parameters["lora_b"]).T
        norm = mx.stop_gradient(mx.linalg.norm(changed, axis=1, keepdims=True))
        return mx.sin(x @ (parameters["m"][:, None] * changed / norm).T + layer.layer.bias).sum()

    parameters = {name: adapter[name] for name in names}
    found, expected = (mx.grad(f, argnums=(0, 1))(parameters, x) for f in (ours, written_down))
    for name in names:
        assert mx.allclose(found[0][name], expected[0][name], rtol=1e-3, atol=1e-3), name
    assert mx.allclose(found[1], expected[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("storage", STORAGES, ids=label)
@pytest.mark.parametrize("kind", KINDS)
@on_mlx
def test_on_an_embedding_look_up_and_head_use_the_same_changed_weight(kind, storage):
    mx.random.seed(4)
    layer = nn.Embedding(96, WIDTH)
    layer = Frozen(
        quantized_layer(layer, "x", storage, "rtn", None) if storage else layer, mx.float32, True
    )
    config = LoRAConfig(kind=kind, rank=4, scale=0.7)
    adapter = config.adapter_kind.make(layer, (96, WIDTH), config)
    tokens, hidden = mx.array([[3, 95, 0]]), mx.random.normal((2, 3, WIDTH))
    assert mx.array_equal(adapter(tokens), layer(tokens)) and mx.array_equal(
        adapter.as_linear(hidden), layer.as_linear(hidden)
    )
    declared = config.adapter_kind.shapes((96, WIDTH), 4, "embedding")
    assert {
        name: array.shape for name, array in tree_flatten(adapter.trainable_parameters())
    } == declared
    for number, (name, shape) in enumerate(declared.items()):
        adapter[name] = mx.random.normal(shape, key=mx.random.key(number)) * 0.3
    changed = layer.dense(mx.float32) + 0.7 * adapter.lora_a @ adapter.lora_b
    if kind == "dora":
        changed = adapter.m[:, None] * changed / mx.linalg.norm(changed, axis=1, keepdims=True)
    assert mx.allclose(adapter(tokens), changed[tokens], rtol=1e-3, atol=1e-3)
    assert mx.allclose(adapter.as_linear(hidden), hidden @ changed.T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@on_mlx
def test_shapes_and_names_on_an_embedding_are_those_of_mlx_lm(kind):
    from mlx_lm.tuner.dora import DoRAEmbedding
    from mlx_lm.tuner.lora import LoRAEmbedding

    theirs = {"lora": LoRAEmbedding, "dora": DoRAEmbedding}[kind](96, WIDTH, r=4)
    declared = registry.get("adapters", kind).shapes((96, WIDTH), 4, "embedding")
    assert {name: theirs[name].shape for name in declared} == declared


@on_mlx
def test_dora_keeps_no_dense_weight_for_the_way_back():
    width, layers = 512, 24
    mx.random.seed(5)
    config = LoRAConfig(kind="dora", rank=4)
    chain = []
    for _ in range(layers):
        layer = quantized_layer(
            nn.Linear(width, width, bias=False), "x", QuantConfig("nf4"), "rtn", None
        )
        chain.append(config.adapter_kind.make(Frozen(layer, None, True), (width, width), config))
    mx.eval([adapter.parameters() for adapter in chain])
    x = mx.random.normal((16, width))

    def run(x: mx.array) -> mx.array:
        for adapter in chain:
            x = mx.tanh(adapter(x) * 3)
        return x.sum()

    mx.eval(x)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(mx.grad(run)(x))
    dense = width * width * 4
    assert mx.get_peak_memory() - before < layers * dense / 1.4


@pytest.mark.parametrize("name", ["llama", "llama tied", "gemma2"])
@pytest.mark.parametrize("kind", KINDS)
@on_mlx
def test_on_embedding_and_head_every_way_to_the_gradients_gives_the_slope_of_the_loss(kind, name):
    module, spec = tiny(name)
    small = quantized(module, spec, QuantConfig("affine", 4, 32))
    heads = [layer.path for layer in spec.layers if layer.block is None]
    lora = LoRAConfig(rank=4, kind=kind, keys=("all-linear", *heads))
    tokens = mx.random.randint(0, 97, (2, 17), key=mx.random.key(0))
    ways = [
        ("whole", TrainConfig(loss_chunk=0)),
        ("whole", TrainConfig(loss_chunk=8)),
        ("whole", TrainConfig(loss_chunk=8, grad_checkpoint=True)),
        ("stepped", TrainConfig(loss_chunk=8)),
    ]
    found, parameters = [], {}
    for how, config in ways:
        step = make_step(
            attach(small, spec, lora, Compute(mx.float32, True), config.grad_checkpoint),
            config,
            how=how,
        )
        for number, (path, array) in enumerate(step.parameters.items()):
            parameters.setdefault(
                path, array + 0.05 * mx.random.normal(array.shape, key=mx.random.key(number))
            )
        found.append(step(parameters, StepBatch(tokens, mx.ones_like(tokens))))
    for sums in found[1:]:
        assert sums.loss.item() == pytest.approx(found[0].loss.item(), rel=1e-5)
        for path, grad in sums.grads.items():
            assert mx.allclose(
                grad, found[0].grads[path], rtol=1e-3, atol=1e-4 * mx.abs(grad).max().item()
            ), path
    for path in (f"{heads[0]}.lora_a", f"{heads[0]}.lora_b"):
        grad, length = found[0].grads[path], 1e-2
        if kind == "dora":
            continue  # its norm counts as a constant, so the slope is another
        moved = [
            step(
                {
                    **parameters,
                    path: parameters[path] + sign * length * grad / mx.linalg.norm(grad),
                },
                StepBatch(tokens, mx.ones_like(tokens)),
            )
            for sign in (1, -1)
        ]
        slope = (moved[0].loss - moved[1].loss).item() / (2 * length)
        assert slope == pytest.approx(mx.linalg.norm(grad).item(), rel=0.02)
