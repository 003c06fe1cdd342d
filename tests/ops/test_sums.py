"""Sums of many numbers, against float64: what MLX's CPU adds one by one is several percent off."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from qlab.engine.memory.read_graph import read
from qlab.ops.sums import cross_entropy, logsumexp, stable_norm, stable_sum
from tests.tiny import on_mlx

LARGE = [2**20, 2**24 + 7, 2**27]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 10, 4096, 4097])
@on_mlx
def test_a_sum_of_any_length_is_right(size):
    vector = mx.random.uniform(shape=(size,), key=mx.random.key(0))
    assert stable_sum(vector).item() == pytest.approx(sum(vector.tolist()), rel=1e-6)
    assert not mx.isfinite(stable_sum(mx.concatenate([vector, mx.array([mx.inf])]))).item()


@on_mlx
def test_a_sum_takes_the_same_operations_whatever_divides_its_length():
    operations = [
        [node.name for node in read(lambda v: [stable_sum(v)], [mx.zeros(n)]).nodes]
        for n in range(4090, 4102)
    ]
    assert all(names == operations[0] for names in operations)


@on_mlx
def test_small_numbers_are_not_lost_beside_a_large_one():
    vector = mx.concatenate([mx.array([2.0**24]), mx.ones(4096)])  # one more than 2²⁴ is no float32
    assert stable_sum(vector).item() == pytest.approx(2**24 + 4096, abs=100)


@pytest.mark.parametrize("size", LARGE)
@pytest.mark.parametrize("kind", ["equal", "squares"])
@on_mlx
def test_a_large_sum_is_that_of_float64(kind, size):
    if kind == "equal":  # the worst: every addition rounds the same way
        array = np.full(size, 0.1, np.float32)
    else:
        array = np.square(np.random.default_rng(0).standard_normal(size, np.float32))
    exact = array.sum(dtype=np.float64)
    assert stable_sum(mx.array(array)).item() == pytest.approx(exact, rel=2e-5)


@on_mlx
def test_a_norm_of_a_large_matrix_is_that_of_float64():
    matrix = np.random.default_rng(0).standard_normal((4096, 4096), np.float32)
    exact = np.linalg.norm(matrix.astype(np.float64))
    assert stable_norm(mx.array(matrix)).item() == pytest.approx(exact, rel=2e-6)


@pytest.mark.parametrize("vocabulary", [1, 2, 257, 50257, 65537, 151936])  # 65537 is prime
@on_mlx
def test_the_loss_over_a_large_vocabulary_is_that_of_float64(vocabulary):
    logits = 3 * np.random.default_rng(0).standard_normal((4, vocabulary), np.float32)
    exact = np.log(np.exp(logits.astype(np.float64)).sum(-1))
    targets = np.arange(4) % vocabulary
    losses = exact - logits[np.arange(4), targets]
    given = mx.array(logits)
    tolerance = 1e-4 if vocabulary == 65537 else 6e-6
    assert np.array(logsumexp(given)) == pytest.approx(exact, abs=tolerance)
    assert logsumexp(given, keepdims=True).shape == (4, 1)
    assert np.array(cross_entropy(given, mx.array(targets))) == pytest.approx(losses, abs=tolerance)


@on_mlx
def test_impossible_tokens_take_no_part_in_the_logarithm_of_a_sum():
    logits = mx.full((2, 4096), -mx.inf)
    logits[0, 5] = 1.5
    assert logsumexp(logits).tolist() == [1.5, -mx.inf]


@on_mlx
def test_the_gradient_of_the_logarithm_of_a_sum_is_the_softmax():
    logits = mx.random.normal((3, 4096), key=mx.random.key(0))
    slope = mx.grad(lambda x: logsumexp(x).sum())(logits)
    assert mx.allclose(slope, mx.softmax(logits, -1), atol=1e-7)
