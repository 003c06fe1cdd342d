"""Products of frozen layers: the same numbers and the same gradients as with the weight written out."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from qlab import registry
from qlab.core.config.quant import QuantConfig
from qlab.nn import frozen as frozen_module
from qlab.nn import linear
from qlab.engine.quantize.quantize import quantized_layer
from qlab.nn.frozen import Frozen
from qlab.nn.linear import product
from tests.tiny import on_mlx

OUT, WIDTH = 40, 64
STORAGES = [None, *(QuantConfig(name) for name in registry.shelf("schemes"))]
TOLERANCE = {mx.float32: 1e-5, mx.bfloat16: 2e-2, mx.float16: 3e-3}


def label(value) -> str:
    return value.mode if isinstance(value, QuantConfig) else str(value)


def layer_and_weight(
    storage: QuantConfig | None, made=nn.Linear, **settings
) -> tuple[nn.Module, mx.array]:
    """Return a layer and its weight as the scheme reads it, ``(out, in)`` in float32."""
    mx.random.seed(4)
    layer = made(OUT, WIDTH) if made is nn.Embedding else made(WIDTH, OUT, **settings)
    if storage is None:
        return layer, layer.weight
    packed = storage.scheme.quantize(layer.weight, storage)
    return quantized_layer(layer, "x", storage, "rtn", None), storage.scheme.dequantize(
        packed, storage, mx.float32
    )


def x_and_cotangent(dtype: mx.Dtype = mx.float32) -> tuple[mx.array, mx.array]:
    x = mx.random.normal((2, 5, WIDTH), key=mx.random.key(1)).astype(dtype)
    return x, mx.random.normal((2, 5, OUT), key=mx.random.key(2)).astype(dtype)


def far(found: mx.array, expected: mx.array) -> float:
    """Largest difference, relative to the largest number."""
    expected = expected.astype(mx.float32)
    return (mx.abs(found.astype(mx.float32) - expected).max() / mx.abs(expected).max()).item()


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("storage", STORAGES[1:], ids=label)
@on_mlx
def test_a_weight_stored_from_16_bits_is_not_rounded_to_them_on_its_way_to_float32(storage, dtype):
    weight = mx.random.normal((OUT, WIDTH), key=mx.random.key(3)).astype(dtype)
    plain = nn.Linear(WIDTH, OUT, bias=False)
    plain.weight = weight
    layer = quantized_layer(plain, "x", storage, "rtn", None)
    wanted = storage.scheme.dequantize(
        storage.scheme.quantize(weight, storage), storage, mx.float32
    )
    assert mx.array_equal(linear.weight_of(layer, mx.float32), wanted)
    x, _ = x_and_cotangent()
    assert far(Frozen(layer, None, True)(x), Frozen(layer, None, False)(x)) < 1e-5


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("storage", STORAGES, ids=label)
@on_mlx
def test_value_and_gradient_of_a_product_are_those_of_the_weight_written_out(storage, dtype):
    layer, weight = layer_and_weight(storage)
    x, cotangent = x_and_cotangent(dtype)
    (y,), (dx,) = mx.vjp(lambda x: product(layer, x), [x], [cotangent])
    assert y.dtype == dx.dtype == dtype and dx.shape == x.shape
    assert far(y, x.astype(mx.float32) @ weight.T) < TOLERANCE[dtype]
    assert far(dx, cotangent.astype(mx.float32) @ weight) < TOLERANCE[dtype]


@pytest.mark.parametrize("storage", STORAGES, ids=label)
@on_mlx
def test_a_product_within_a_compiled_function_is_the_same(storage):
    layer, weight = layer_and_weight(storage)
    x, cotangent = x_and_cotangent()
    loss = mx.value_and_grad(lambda x: (mx.tanh(product(layer, x)) * cotangent).sum())
    value, dx = mx.compile(loss)(x)
    expected, by_hand = mx.value_and_grad(lambda x: (mx.tanh(x @ weight.T) * cotangent).sum())(x)
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    assert far(dx, by_hand) < 1e-5


@pytest.mark.parametrize("made", [nn.Linear, nn.Embedding], ids=lambda x: x.__name__)
@pytest.mark.parametrize("keep", [False, True], ids=["", "keep"])
@pytest.mark.parametrize("dequantize", [True, False], ids=["dequantize", "kernel"])
@pytest.mark.parametrize("storage", STORAGES, ids=label)
@on_mlx
def test_a_frozen_layer_multiplies_like_the_layer_that_it_holds(storage, dequantize, keep, made):
    layer, weight = layer_and_weight(storage, made)
    frozen = Frozen(layer, None, dequantize, keep)
    x, cotangent = x_and_cotangent()
    if made is nn.Embedding:
        tokens = mx.array([[3, 0, 39], [7, 7, 1]])
        assert far(frozen(tokens), weight[tokens]) < 1e-5
    (y,), (dx,) = mx.vjp(frozen if made is nn.Linear else frozen.as_linear, [x], [cotangent])
    assert far(y, x @ weight.T + (layer.bias if made is nn.Linear else 0)) < 1e-5
    assert far(dx, cotangent @ weight) < 1e-5
    assert far(frozen.dense(mx.float32), weight) < 1e-6


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("how", ["kernel", "again", "keep", "lent"])
@pytest.mark.parametrize("storage", STORAGES, ids=label)
@on_mlx
def test_an_adapted_product_and_its_gradients_are_those_of_both_products_written_out(
    storage, how, compiled
):
    layer, weight = layer_and_weight(storage)
    frozen = Frozen(layer, None, how != "kernel", how == "keep")
    x, cotangent = x_and_cotangent()
    first, second = (
        mx.random.normal(shape, key=mx.random.key(n))
        for n, shape in ((5, (WIDTH, 3)), (6, (3, OUT)))
    )

    def found(*arrays):
        with frozen.using_dense(weight if how == "lent" else None):
            (y,), grads = mx.vjp(lambda x, a, b: frozen.adapted(x, a, b, 1.7), arrays, [cotangent])
        return [y, *grads]

    expected = mx.vjp(
        lambda x, a, b: x @ weight.T + layer.bias + 1.7 * (x @ a) @ b,
        [x, first, second],
        [cotangent],
    )
    for a, b in zip(
        (mx.compile(found) if compiled else found)(x, first, second),
        expected[0] + expected[1],
        strict=True,
    ):
        assert a.shape == b.shape and far(a, b) < 1e-5


@pytest.mark.parametrize("keep", [False, True], ids=["", "keep"])
@pytest.mark.parametrize("storage", STORAGES, ids=label)
@on_mlx
def test_a_weight_dequantized_once_gives_the_same_value_and_gradient(storage, keep):
    layer, weight = layer_and_weight(storage)
    frozen = Frozen(layer, None, True, keep)
    x, cotangent = x_and_cotangent()
    expected = mx.vjp(frozen, [x], [cotangent])
    with frozen.dequantized_once(x):
        found = mx.vjp(frozen, [x], [cotangent])
    for a, b in zip(found, expected, strict=True):
        assert far(a[0], b[0]) < 1e-6
    assert far(found[0][0], x @ weight.T + layer.bias) < 1e-5


@on_mlx
def test_once_dequantizes_once_and_lets_go_also_after_an_error(monkeypatch):
    layer, _ = layer_and_weight(QuantConfig("nf4"))
    frozen, (x, _) = Frozen(layer, None, True), x_and_cotangent()
    read, real = [], linear.weight_of
    for reader in (linear, frozen_module):
        monkeypatch.setattr(reader, "weight_of", lambda *args: (read.append(1), real(*args))[1])
    with frozen.dequantized_once(x):
        _ = frozen(x), frozen.as_linear(x)
    assert len(read) == 1
    with pytest.raises(ZeroDivisionError), frozen.dequantized_once(x):
        _ = 1 / 0
    assert len(read) == 2
    _ = frozen(x), frozen.as_linear(x)
    assert len(read) == 4


@pytest.mark.parametrize("storage", [None, QuantConfig("affine"), QuantConfig("nf4")], ids=label)
@on_mlx
def test_a_frozen_embedding_sets_the_dtype_of_what_follows(storage):
    layer, _ = layer_and_weight(storage, nn.Embedding)
    tokens = mx.array([[1, 2]])
    assert Frozen(layer, mx.bfloat16, True)(tokens).dtype == mx.bfloat16
    assert Frozen(layer, None, True)(tokens).dtype == mx.float32


@pytest.mark.parametrize("storage", STORAGES, ids=label)
@on_mlx
def test_a_frozen_layer_has_nothing_to_train_and_answers_for_the_layer_that_it_holds(storage):
    layer, _ = layer_and_weight(storage, bias=False)
    frozen = Frozen(layer, None, True)
    assert tree_flatten(frozen.trainable_parameters()) == []
    assert frozen.weight is layer.weight
    with pytest.raises(AttributeError, match="nonsense"):
        _ = frozen.nonsense
