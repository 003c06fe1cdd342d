"""Attention with a gradient of its own: the numbers of MLX's, for every mask, from fewer arrays."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from qlab.ops import attention as module
from qlab.ops.attention import attention
from tests.tiny import on_mlx

SIZES = {
    "one head": (1, 1, 1),
    "a group": (2, 4, 1),
    "groups": (2, 6, 3),
    "many": (1, 32, 16),
}  # batch, heads, groups
LENGTHS = pytest.mark.parametrize("length, others", [(7, 7), (4, 9), (1, 5)])


pytestmark = pytest.mark.usefixtures("on_cpu")


def given(size: str, length: int, others: int, width: int = 8, out: int = 5) -> list[mx.array]:
    batch, heads, groups = SIZES[size]
    shapes = [
        (batch, heads, length, width),
        (batch, groups, others, width),
        (batch, groups, others, out),
        (batch, heads, length, out),
    ]
    return [2 * mx.random.normal(shape, key=mx.random.key(n)) for n, shape in enumerate(shapes)]


def masks(size: str, length: int, others: int) -> dict:
    batch, heads, _ = SIZES[size]
    draw = np.random.default_rng(0)
    seen = draw.random((batch, 1, length, others)) < 0.6
    seen[0, 0, 0] = False  # a row that sees nothing
    by_head = draw.standard_normal((batch, heads, length, others))
    return {
        "none": None,
        "causal": "causal",
        "seen": mx.array(seen),
        "seen, of all rows": mx.array(seen[0, 0]),
        "seen by head": mx.array(by_head > 0),
        "keys seen": mx.array(seen[:, :, -1:]),
        "added": mx.array(by_head[0, 0].astype(np.float32)),
        "added by head": mx.array(by_head.astype(np.float32)),
    }


NAMES = list(masks("one head", 1, 1))


def exact(q, k, v, slope, mask, scale):
    """Output and gradients in float64."""
    q, k, v, slope = (np.array(a).astype(np.float64) for a in (q, k, v, slope))
    repeat, (n, m) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    full_k, full_v = k.repeat(repeat, 1), v.repeat(repeat, 1)
    scores = q @ full_k.swapaxes(-1, -2) * scale
    if isinstance(mask, str):
        mask = mx.array(np.arange(m - n, m)[:, None] >= np.arange(m))
    if mask is not None:
        mask = np.array(mask)
        scores = np.where(mask, scores, -1e30) if mask.dtype == bool else scores + mask
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    out = p @ full_v
    by_p = slope @ full_v.swapaxes(-1, -2)
    by_score = p * (by_p - (p * by_p).sum(-1, keepdims=True))
    if mask is not None and mask.dtype == bool:
        by_score = np.where(mask, by_score, 0)  # also where a row sees nothing
    groups = lambda a: a.reshape(a.shape[0], k.shape[1], repeat, *a.shape[2:]).sum(2)  # noqa: E731
    by_k, by_v = groups(by_score.swapaxes(-1, -2) @ q) * scale, groups(p.swapaxes(-1, -2) @ slope)
    return [out, by_score @ full_k * scale, by_k, by_v], by_score


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("name", NAMES)
@LENGTHS
@pytest.mark.parametrize("size", SIZES)
@on_mlx
def test_value_and_gradients_are_exact(size, length, others, name, compiled):
    q, k, v, slope = given(size, length, others)
    mask = masks(size, length, others)[name]

    def run(q, k, v, slope):
        (out,), slopes = mx.vjp(
            lambda *a: [attention(*a, None, scale=0.3, mask=mask)], [q, k, v], [slope]
        )
        return [out, *slopes]

    wanted, _ = exact(q, k, v, slope, mask, 0.3)
    for found, right in zip(
        (mx.compile(run) if compiled else run)(q, k, v, slope), wanted, strict=True
    ):
        np.testing.assert_allclose(
            np.array(found), right, rtol=1e-5, atol=1e-5 * max(np.abs(right).max(), 1)
        )


@pytest.mark.parametrize("name", NAMES)
@on_mlx
def test_they_are_mlx_own(name):
    q, k, v, slope = given("groups", 6, 6, out=8)
    mask = masks("groups", 6, 6)[name]
    stock = lambda q, k, v: [mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask)]  # noqa: E731
    (a,), own = mx.vjp(lambda *a: [attention(*a, scale=0.3, mask=mask)], [q, k, v], [slope])
    (b,), theirs = mx.vjp(stock, [q, k, v], [slope])
    for found, right in zip([a, *own], [b, *theirs], strict=True):
        assert mx.allclose(found, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 6, 4, 9), (1, 1, 4, 9), (4, 9), (2, 1, 1, 9), (6, 4, 1)])
@on_mlx
def test_numbers_that_are_added_have_a_gradient(shape):
    q, k, v, slope = given("groups", 4, 9)
    mask = mx.random.normal(shape)
    _, (found,) = mx.vjp(lambda mask: [attention(q, k, v, scale=0.3, mask=mask)], [mask], [slope])
    full = exact(q, k, v, slope, mask, 0.3)[1]
    padded = (1,) * (4 - len(shape)) + shape
    right = full.sum(tuple(i for i, n in enumerate(padded) if n == 1), keepdims=True).reshape(shape)
    np.testing.assert_allclose(np.array(found), right, rtol=1e-4, atol=1e-5)


@on_mlx
def test_what_is_not_written_out_is_mlx_lms(monkeypatch):
    from mlx_lm.models import base

    asked = []
    monkeypatch.setattr(
        base, "scaled_dot_product_attention", lambda q, *_: asked.append(q.dtype) or q
    )
    q, k, v, _ = given("groups", 4, 4)
    attention(q, k, v, None, 0.3, "causal")
    assert not asked
    attention(*(a.astype(mx.bfloat16) for a in (q, k, v)), None, 0.3, "causal")
    attention(q, k, v, None, 0.3, None, sinks=mx.zeros(6))
    attention(q, k, v, type("Quantized", (), {"bits": 8})(), 0.3, None)
    attention(q, k, v, None, 0.3, mx.zeros((4, 4), mx.float16))
    monkeypatch.setattr(module, "is_slow", lambda _: False)  # a GPU
    attention(q, k, v, None, 0.3, "causal")
    assert asked == [mx.bfloat16] + [mx.float32] * 4
