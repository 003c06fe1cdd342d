"""One step of training: every way of computing it gives the numbers of plain differentiation."""

from __future__ import annotations

import functools

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from qlab.core.config.quant import QuantConfig
from qlab.core.config.lora import LoRAConfig
from qlab.core.config.train import TrainConfig
from qlab.engine.models.skeleton import describe
from qlab.nn.frozen import Compute
from qlab.engine.step.whole import WholeGraphStep
from qlab.engine.adapt.attach import attach
from qlab.engine.models.surgery import module_at
from qlab.errors import UnsupportedError
from qlab.engine.step.protocol import StepBatch
from tests.tiny import dense, on_mlx, quantized, tiny

STORAGES = [None, QuantConfig("affine", 4), QuantConfig("mxfp4"), QuantConfig("nf4")]
VARIANTS = [
    TrainConfig(grad_checkpoint=again, loss_chunk=chunk)
    for again in (False, True)
    for chunk in (0, 7)
]
WHOLE, *OTHERS = VARIANTS
PRECISION = 1e-5
HEADS = {"tied": {"tie_word_embeddings": True}, "untied": {}}


def label(value) -> str:
    if isinstance(value, TrainConfig):
        return f"{'again' if value.grad_checkpoint else 'keep'}-{value.loss_chunk}"
    return getattr(value, "mode", str(value))


@functools.cache
def model(storage: QuantConfig | None, head: str = "untied"):
    """Return a tiny llama under a storage, its spec, and the same numbers in plain layers."""
    module, spec = tiny(**HEADS[head])
    stored = quantized(module, spec, storage)
    return stored, describe(stored, "tiny"), dense(module, spec, storage, **HEADS[head])


def batch(rows: int = 2) -> tuple[mx.array, mx.array]:
    """Return tokens and a mask with holes: 12 targets a row at most, so chunks of 7 leave a rest."""
    tokens = mx.random.randint(0, 97, (rows, 13), key=mx.random.key(1))
    return tokens, (mx.random.uniform(shape=(rows, 13), key=mx.random.key(2)) < 0.7).astype(
        mx.int32
    )


def made(
    module, spec, lora: LoRAConfig, train: TrainConfig, compute: Compute | None = None
) -> WholeGraphStep:
    """Return a step whose second factors are random instead of zero."""
    mx.random.seed(5)
    return WholeGraphStep(
        attach(module, spec, lora, compute or Compute(None, True), train.grad_checkpoint), train
    )


def stirred(parameters: dict[str, mx.array]) -> dict[str, mx.array]:
    keys = mx.random.split(mx.random.key(6), len(parameters))
    drawn = {
        path: 0.1 * mx.random.normal(a.shape, a.dtype, key=key)
        for key, (path, a) in zip(keys, parameters.items(), strict=True)
    }
    return {path: drawn[path] if path.endswith("lora_b") else a for path, a in parameters.items()}


def numbers(
    module,
    spec,
    lora: LoRAConfig,
    train: TrainConfig,
    compute: Compute | None = None,
    key=None,
    given=None,
):
    """Return loss, gradients and count of the batch, evaluated, and the parameters that they belong to."""
    step = made(module, spec, lora, train, compute)
    parameters = stirred(step.parameters)
    found = step(parameters, StepBatch(*(given or batch()), key))
    mx.eval(found)
    return found, parameters


def by_hand(plain, lora: LoRAConfig, parameters, tokens, mask):
    """Differentiate the model's own forward pass, with the adapters written into dense weights."""
    paths = sorted({path.rpartition(".")[0] for path in parameters})
    before = {path: module_at(plain, path).weight for path in paths}

    def nats(p):
        for path in paths:
            a, b = p[f"{path}.lora_a"], p[f"{path}.lora_b"]
            module_at(plain, path).weight = before[path] + lora.scale * (
                (a @ b).T if a.ndim == 2 else b @ a
            )
        losses = nn.losses.cross_entropy(plain(tokens[:, :-1]), tokens[:, 1:])
        return mx.where(mask[:, 1:] > 0, losses, 0).sum()

    loss, grads = mx.value_and_grad(nats)(parameters)
    mx.eval(loss, grads)
    for path in paths:
        module_at(plain, path).weight = before[path]
    return loss, grads


def assert_same(found, expected, precision: float = PRECISION) -> None:
    """Compare loss and gradients; each gradient relative to its own norm."""
    assert found[0].item() == pytest.approx(expected[0].item(), rel=precision)
    assert found[1].keys() == expected[1].keys()
    for path, grad in expected[1].items():
        size = mx.linalg.norm(grad).item()
        assert size > 1e-4 and mx.linalg.norm(found[1][path] - grad).item() < precision * size, path


@pytest.mark.parametrize("dequantize", [True, False], ids=["dequantize", "kernel"])
@pytest.mark.parametrize("train", VARIANTS, ids=label)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("storage", STORAGES, ids=label)
@on_mlx
def test_loss_and_gradients_are_those_of_plain_differentiation(storage, head, train, dequantize):
    module, spec, plain = model(storage, head)
    lora = LoRAConfig(rank=4)
    found, parameters = numbers(module, spec, lora, train, Compute(None, dequantize))
    assert len(parameters) == 2 * 7 * 3
    assert_same(found, by_hand(plain, lora, parameters, *batch()))
    assert found[2].item() == batch()[1][:, 1:].sum().item()


@pytest.mark.parametrize("train", VARIANTS, ids=label)
@pytest.mark.parametrize(
    "lora",
    [
        LoRAConfig(rank=4, num_layers=1),
        LoRAConfig(rank=2, num_layers=2, keys=("q_proj", "down_proj")),
        LoRAConfig(rank=4, scale=7.0, keys="model.layers.1.*"),
        LoRAConfig(rank=4, keys=("lm_head", "v_proj")),
        LoRAConfig(rank=4, keys="lm_head"),
    ],
    ids=lambda x: f"{x.num_layers}-{x.keys}",
)
@on_mlx
def test_the_same_with_adapters_on_some_layers_only(lora, train):
    module, spec, plain = model(QuantConfig("nf4"))
    found, parameters = numbers(module, spec, lora, train)
    assert {path.rpartition(".")[0] for path in parameters} == {
        layer.path for layer in lora.targets(spec)
    }
    assert_same(found, by_hand(plain, lora, parameters, *batch()))


@pytest.mark.parametrize("train", VARIANTS, ids=label)
@pytest.mark.parametrize("name", ["gemma2", "mixtral", "mistral3", "gpt_neox", "lfm2", "cohere2"])
@on_mlx
def test_the_same_for_other_architectures(name, train):
    module, spec = tiny(name)
    lora = LoRAConfig(rank=4)
    found, parameters = numbers(module, spec, lora, train)
    assert_same(
        found, by_hand(dense(module, spec, None, name), lora, parameters, *batch()), 3 * PRECISION
    )


@pytest.mark.parametrize("train", OTHERS, ids=label)
@pytest.mark.parametrize("storage", STORAGES, ids=label)
@on_mlx
def test_with_the_same_key_every_way_drops_the_same_inputs(storage, train):
    module, spec, _ = model(storage)
    lora, key = LoRAConfig(rank=4, dropout=0.2), mx.random.key(9)
    expected, parameters = numbers(module, spec, lora, WHOLE, key=key)
    found, _ = numbers(module, spec, lora, train, key=key)
    assert_same(found, expected)
    assert not any("dropout" in path for path in parameters)


@pytest.mark.parametrize("chunk", [0, 7])
@on_mlx
def test_with_an_adapter_on_the_head_checkpoints_drop_the_same_inputs_too(chunk):
    module, spec, _ = model(None)
    lora, key = LoRAConfig(rank=4, dropout=0.2, keys=("lm_head", "q_proj")), mx.random.key(9)
    ways = [TrainConfig(grad_checkpoint=again, loss_chunk=chunk) for again in (False, True)]
    keep, again = (numbers(module, spec, lora, train, key=key)[0] for train in ways)
    assert_same(again, keep)


@on_mlx
def test_another_key_drops_others_and_every_layer_has_its_own():
    module, spec, _ = model(None)
    lora = LoRAConfig(rank=4, dropout=0.2, keys=("k_proj", "v_proj"))
    losses = [
        numbers(module, spec, lora, WHOLE, key=mx.random.key(i))[0][0].item() for i in (1, 2, 1)
    ]
    without = numbers(module, spec, LoRAConfig(rank=4, keys=lora.keys), WHOLE)[0][0].item()
    assert losses[0] == losses[2] and len({*losses, without}) == 3
    step = made(module, spec, lora, WHOLE)
    step(step.parameters, StepBatch(*batch(), mx.random.key(1)))
    keys = {
        path: a.tolist()
        for path, a in tree_flatten(step.module.parameters())
        if path.endswith("dropout_key")
    }
    assert len(keys) == 6 and len({tuple(a) for a in keys.values()}) == 6


@pytest.mark.parametrize("train", VARIANTS, ids=label)
@on_mlx
def test_gradients_with_dropout_are_those_of_differentiating_with_these_masks(train):
    module, spec, _ = model(QuantConfig("affine", 4))
    step = made(module, spec, LoRAConfig(rank=4, dropout=0.2), train)
    parameters, (tokens, mask) = stirred(step.parameters), batch()
    found = step(
        parameters, StepBatch(tokens, mask, mx.random.key(9))
    )  # leaves its keys in the module

    def nats(p):
        step.module.update(tree_unflatten(list(p.items())))
        return (
            nn.losses.cross_entropy(step.module(tokens[:, :-1]), tokens[:, 1:]) * mask[:, 1:]
        ).sum()

    assert_same(found, mx.value_and_grad(nats)(parameters))


@pytest.mark.parametrize("train", VARIANTS, ids=label)
@pytest.mark.parametrize(
    "path",
    [
        "model.layers.0.self_attn.v_proj.lora_a",
        "model.layers.2.mlp.down_proj.lora_b",
        "lm_head.lora_a",
    ],
)
@on_mlx
def test_a_gradient_is_the_slope_between_two_losses(path, train):
    module, spec, _ = model(QuantConfig("nf4"))
    step = made(
        module,
        spec,
        LoRAConfig(rank=4, dropout=0.2, keys=("v_proj", "down_proj", "lm_head")),
        train,
    )
    parameters, key = stirred(step.parameters), mx.random.key(9)
    grads = step(parameters, StepBatch(*batch(), key)).grads
    row, column = divmod(mx.argmax(mx.abs(grads[path])).item(), grads[path].shape[1])

    def loss(by: float) -> float:
        moved = mx.array(parameters[path])
        moved[row, column] += by
        return step({**parameters, path: moved}, StepBatch(*batch(), key)).loss.item()

    slope = (loss(0.02) - loss(-0.02)) / 0.04
    assert grads[path][row, column].item() == pytest.approx(slope, rel=5e-3)


@pytest.mark.parametrize("train", VARIANTS, ids=label)
@on_mlx
def test_what_no_counted_target_sees_has_no_effect(train):
    module, spec, _ = model(None)
    tokens, _ = batch(3)
    mask = mx.zeros((3, 13), mx.int32)
    mask[0, 4:9] = 1  # a prompt, an answer, padding
    mask[1, 5:] = 1  # no padding; the third row is all padding
    lora = LoRAConfig(rank=4)
    expected, _ = numbers(module, spec, lora, train, given=(tokens, mask))
    assert expected[2].item() == 13

    def changed(row: int, column: int):
        other = mx.array(tokens)
        other[row, column] = (other[row, column] + 1) % 97
        return numbers(module, spec, lora, train, given=(other, mask))[0]

    for place in [(0, 9), (0, 12), (2, 0), (2, 7)]:
        assert_same(changed(*place), expected, 1e-6)
    for place in [(0, 0), (0, 3), (0, 8), (1, 12)]:  # prompts are inputs; answers are targets
        assert changed(*place)[0].item() != pytest.approx(expected[0].item(), rel=1e-4)


@pytest.mark.parametrize("train", VARIANTS, ids=label)
@on_mlx
def test_the_first_token_of_a_row_is_no_target(train):
    module, spec, _ = model(None)
    tokens, mask = batch()
    found = []
    for first in (0, 1):
        mask[:, 0] = first
        found.append(numbers(module, spec, LoRAConfig(rank=4), train, given=(tokens, mask))[0])
    assert found[0][0].item() == found[1][0].item()
    assert found[0][2].item() == found[1][2].item() == mask[:, 1:].sum().item()


@pytest.mark.parametrize("train", VARIANTS, ids=label)
@on_mlx
def test_a_batch_without_targets_gives_zeros_and_nothing_else(train):
    module, spec, _ = model(QuantConfig("mxfp4"))
    given = batch()[0], mx.zeros((2, 13), mx.int32)
    (loss, grads, count), parameters = numbers(module, spec, LoRAConfig(rank=4), train, given=given)
    assert loss.item() == count.item() == 0
    assert grads.keys() == parameters.keys()
    assert all(mx.array_equal(grad, mx.zeros_like(grad)) for grad in grads.values())


@pytest.mark.parametrize("train", VARIANTS, ids=label)
@on_mlx
def test_two_half_batches_add_up_to_the_whole_one(train):
    module, spec, _ = model(QuantConfig("affine", 4))
    tokens, mask = batch(4)
    mask[3] = 0  # halves of unlike weight
    whole, a, b = (
        numbers(module, spec, LoRAConfig(rank=4), train, given=(tokens[rows], mask[rows]))[0]
        for rows in (slice(0, 4), slice(0, 2), slice(2, 4))
    )
    assert a[2].item() > b[2].item() > 0 and a[2].item() + b[2].item() == whole[2].item()
    assert_same((a[0] + b[0], {path: a[1][path] + b[1][path] for path in a[1]}), whole)


@pytest.mark.parametrize("factors", ["float32", "bfloat16"])
@pytest.mark.parametrize("train", VARIANTS, ids=label)
@on_mlx
def test_the_loss_is_float32_and_gradients_are_what_their_parameters_are(train, factors):
    module, spec, _ = model(QuantConfig("nf4"))
    lora = LoRAConfig(rank=4, dtype=factors)
    (loss, grads, count), parameters = numbers(
        module, spec, lora, train, Compute(mx.bfloat16, True)
    )
    assert loss.dtype == count.dtype == mx.float32
    assert {grad.dtype for grad in grads.values()} == {getattr(mx, factors)}
    assert all(grads[path].shape == a.shape for path, a in parameters.items())
    fine = numbers(module, spec, LoRAConfig(rank=4), train)[0]
    assert loss.item() != fine[0].item() and loss.item() == pytest.approx(fine[0].item(), rel=0.02)
    for path, grad in fine[1].items():
        assert (
            mx.linalg.norm(grads[path].astype(mx.float32) - grad).item()
            < 0.15 * mx.linalg.norm(grad).item()
        )


@pytest.mark.parametrize("train", VARIANTS, ids=label)
@pytest.mark.parametrize("storage", [None, QuantConfig("affine", 4), QuantConfig("nf4")], ids=label)
@on_mlx
def test_the_model_itself_is_left_as_it_was(storage, train):
    module, spec, _ = model(storage)
    tokens, mask = batch()
    logits, arrays = module(tokens), dict(tree_flatten(module.parameters()))
    kinds = {path: type(x) for path, x in module.named_modules()}
    step = made(module, spec, LoRAConfig(rank=4, dropout=0.2), train)
    found = step(stirred(step.parameters), StepBatch(tokens, mask, mx.random.key(1)))
    assert {path: type(x) for path, x in module.named_modules()} == kinds
    now = dict(tree_flatten(module.parameters()))
    assert now.keys() == arrays.keys() and all(now[path] is arrays[path] for path in arrays)
    mx.eval(found)
    assert mx.array_equal(module(tokens), logits)


@pytest.mark.parametrize("train", VARIANTS, ids=label)
@on_mlx
def test_a_step_may_be_taken_again_and_gives_the_same(train):
    module, spec, _ = model(QuantConfig("nf4"))
    step = made(module, spec, LoRAConfig(rank=4), train)
    parameters = stirred(step.parameters)
    first = step(parameters, StepBatch(*batch()))
    step({path: 2 * a for path, a in parameters.items()}, StepBatch(*batch(3)))
    again = step(parameters, StepBatch(*batch()))
    assert_same(again, first, 1e-7)
    assert first[0].item() == again[0].item()
    held = dict(tree_flatten(step.module.trainable_parameters()))
    assert held.keys() == parameters.keys() and all(held[path] is parameters[path] for path in held)


@on_mlx
def test_a_model_that_cannot_be_taken_apart_is_refused_only_where_it_must_be():
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(16, 64), nn.Linear(64, 16)

        def __call__(self, tokens):
            return self.head(self.embed(tokens))

    module = Flat()
    spec, lora = describe(module, "flat"), LoRAConfig(rank=4, keys="head")
    for train in OTHERS:
        with pytest.raises(UnsupportedError, match="no list of blocks"):
            made(module, spec, lora, train)
    (loss, grads, _), _ = numbers(
        module, spec, lora, WHOLE, given=(mx.array([[1, 2, 3]]), mx.ones((1, 3)))
    )
    assert loss.item() > 0 and len(grads) == 2


@on_mlx
def test_attaching_leaves_the_model_as_trainable_as_it_was():
    module, spec, _ = model(None)
    before = len(tree_flatten(module.trainable_parameters()))
    attach(module, spec, LoRAConfig(rank=4), Compute(None, True), False)
    assert before == len(tree_flatten(module.trainable_parameters())) > 0


@on_mlx
def test_another_order_of_the_parameters_is_kept_and_not_compiled_anew():
    module, spec = tiny()
    step = WholeGraphStep(
        attach(module, spec, LoRAConfig(rank=2), Compute(mx.float32, True), False), TrainConfig()
    )
    tokens = mx.arange(12).reshape(2, 6)
    for parameters in (step.parameters, dict(reversed(step.parameters.items()))):
        assert list(step(parameters, StepBatch(tokens, mx.ones_like(tokens))).grads) == list(
            parameters
        )
    assert step.traces == (1 if mx.default_device() == mx.cpu else 0)
