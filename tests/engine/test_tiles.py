"""Attention at lengths that are no whole tiles: the same numbers, computed in whole tiles."""

from __future__ import annotations

import mlx.core as mx
import pytest

from qlab.engine.tiles import in_tiles
from tests.tiny import on_mlx

STOCK = mx.fast.scaled_dot_product_attention


def masks(length: int) -> dict:
    seen = mx.tril(mx.ones((length, length), mx.bool_)) & (mx.arange(length)[:, None] // 100 == mx.arange(length) // 100)
    return {"causal": "causal", "bool": seen[None, None], "added": mx.where(seen, 0.0, -mx.inf)[None, None], "flat": seen}


@pytest.mark.parametrize("kind", ["causal", "bool", "added", "flat"])
@pytest.mark.parametrize("length", [256, 300, 383])
@on_mlx
def test_value_and_gradients_are_those_of_the_length_as_it_is(length, kind):
    q, k, v, slope = (mx.random.normal((2, heads, length, 8), key=mx.random.key(n)) for n, heads in enumerate((4, 2, 2, 4)))
    mask = masks(length)[kind]
    found, wanted = (mx.vjp(lambda *a, f=f: [f(*a, scale=0.3, mask=mask)], [q, k, v], [slope]) for f in (in_tiles, STOCK))
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
def test_nothing_is_added_where_it_might_be_seen_or_is_not_worth_it(length, mask, width, computed, monkeypatch):
    met = []
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", lambda q, *a, **k: met.append(q.shape[2]) or STOCK(q, *a, **k))
    x = mx.random.normal((1, 2, length, width))
    given = mx.ones((1, 1, 1, length), mx.bool_) if mask == "row" else mask
    assert in_tiles(x, x, x, scale=1.0, mask=given).shape == x.shape
    assert met == [computed]
