"""Attention at lengths that are no whole tiles: the same numbers, computed in whole tiles."""

from __future__ import annotations

import mlx.core as mx
import pytest

from qlab.ops import attention
from qlab.engine.step.patches import patched
from qlab.engine.step.patches import call_sites
from qlab.ops.attention_tiles import whole_tiles
from tests.tiny import on_mlx, tiny


def in_tiles(q, k, v, mask):
    q_, k_, v_, mask = whole_tiles(q, k, v, mask)
    return stock(q_, k_, v_, mask)[:, :, : q.shape[2]]


def stock(q, k, v, mask):
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask)


def masks(length: int) -> dict:
    seen = mx.tril(mx.ones((length, length), mx.bool_)) & (
        mx.arange(length)[:, None] // 100 == mx.arange(length) // 100
    )
    return {
        "causal": "causal",
        "bool": seen[None, None],
        "added": mx.where(seen, 0.0, -mx.inf)[None, None],
        "flat": seen,
    }


@pytest.mark.parametrize("kind", ["causal", "bool", "added", "flat"])
@pytest.mark.parametrize("length", [256, 300, 383])
@on_mlx
def test_value_and_gradients_are_those_of_the_length_as_it_is(length, kind):
    q, k, v, slope = (
        mx.random.normal((2, heads, length, 8), key=mx.random.key(n))
        for n, heads in enumerate((4, 2, 2, 4))
    )
    mask = masks(length)[kind]
    found, wanted = (
        mx.vjp(lambda *a, f=f: [f(*a, mask)], [q, k, v], [slope]) for f in (in_tiles, stock)
    )
    for own, other in zip([*found[0], *found[1]], [*wanted[0], *wanted[1]], strict=True):
        assert own.shape == other.shape
        assert mx.allclose(own, other, atol=1e-5)


@pytest.mark.parametrize(
    ("length", "mask", "width", "computed"),
    [
        (300, "causal", 8, 384),
        (384, "causal", 8, 384),
        (129, "causal", 8, 129),
        (300, "causal", 160, 300),
        (300, None, 8, 300),
        (300, "row", 8, 300),
    ],
)
@on_mlx
def test_nothing_is_added_where_it_might_be_seen_or_is_not_worth_it(length, mask, width, computed):
    x = mx.random.normal((1, 2, length, width))
    given = mx.ones((1, 1, 1, length), mx.bool_) if mask == "row" else mask
    assert {a.shape[2] for a in whole_tiles(x, x, x, given)[:3]} == {computed}


@on_mlx
def test_a_model_on_cuda_attends_in_whole_tiles_with_the_same_result(monkeypatch):
    module, _ = tiny(max_position_embeddings=512)
    module.set_dtype(mx.bfloat16)  # float32 has an attention of its own on a CPU
    tokens, met = mx.arange(300)[None] % 97, []
    wanted, fused = module(tokens), mx.fast.scaled_dot_product_attention
    monkeypatch.setattr(attention, "backend", lambda: "cuda")
    monkeypatch.setattr(
        mx.fast,
        "scaled_dot_product_attention",
        lambda q, *a, **k: met.append(q.shape[2]) or fused(q, *a, **k),
    )
    with patched(call_sites(module)):
        assert mx.allclose(module(tokens), wanted, atol=2e-2)
    assert set(met) == {384}
