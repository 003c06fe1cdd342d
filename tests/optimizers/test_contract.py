"""What every optimizer on the shelf must do: a new file is tested by standing there."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from qlab import registry
from tests.tiny import on_mlx

KINDS = list(registry.shelf("optimizers").values())
SHAPES = [(7,), (64,), (8, 64), (64, 8), (1, 5), (3, 8, 16), (65, 65)]


def name(value) -> str:
    return getattr(value, "name", None) or "x".join(map(str, value))


def stepped(
    kind, weight: mx.array, gradient: mx.array, learning_rate: float = 1e-2
) -> tuple[mx.array, dict[str, mx.array]]:
    """Return the weight after one update, and what the optimizer keeps for it."""
    optimizer = kind.make(learning_rate)
    optimizer.init({"w": weight})
    new = optimizer.apply_gradients({"w": gradient}, {"w": weight})["w"]
    kept = {
        path: array
        for path, array in tree_flatten(optimizer.state)
        if path not in ("step", "learning_rate")
    }
    mx.eval(new, kept)
    return new, kept


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=name)
@pytest.mark.parametrize("kind", KINDS, ids=name)
@on_mlx
def test_bytes_are_those_really_kept(kind, shape, dtype):
    weight = mx.random.normal(shape, key=mx.random.key(0)).astype(dtype)
    new, kept = stepped(kind, weight, mx.random.normal(shape, key=mx.random.key(1)).astype(dtype))
    assert all(path.startswith("w.") for path in kept)
    assert kind.state_nbytes(shape, dtype.size) == sum(array.nbytes for array in kept.values()) > 0
    assert new.shape == shape and new.dtype == dtype


@pytest.mark.parametrize("shape", SHAPES, ids=name)
@pytest.mark.parametrize("kind", KINDS, ids=name)
@on_mlx
def test_one_update_lowers_a_quadratic_loss(kind, shape):
    weight, goal = (
        mx.random.normal(shape, key=mx.random.key(2)),
        mx.random.normal(shape, key=mx.random.key(3)),
    )
    new, _ = stepped(kind, weight, weight - goal)
    before, after = mx.square(weight - goal).sum().item(), mx.square(new - goal).sum().item()
    assert 0.5 * before < after < before


@pytest.mark.parametrize("kind", KINDS, ids=name)
@on_mlx
def test_the_learning_rate_is_the_one_asked_for(kind):
    weight, gradient = mx.ones((8, 16)), mx.random.normal((8, 16), key=mx.random.key(4))
    moved = [
        mx.linalg.norm(stepped(kind, weight, gradient, rate)[0] - weight).item()
        for rate in (1e-3, 1e-1)
    ]
    assert moved[1] / moved[0] == pytest.approx(100, rel=0.01)


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
@on_mlx
def test_the_first_update_of_adamw_is_corrected_for_its_bias(size):
    # both moments start at zero; uncorrected, the first update is 0.1 / √0.001 = 3.2 learning rates
    weight = mx.random.uniform(-1, 1, (16, 8), key=mx.random.key(5))
    gradient = (
        size * mx.random.uniform(0.1, 2, (16, 8), key=mx.random.key(6)) * mx.sign(weight[::-1])
    )
    new, _ = stepped(registry.get("optimizers", "adamw"), weight, gradient)
    moved = (weight - new) * mx.sign(gradient)
    assert mx.abs(moved / 1e-2 - 1).max().item() < 0.02


@on_mlx
def test_adamw_keeps_on_moving_by_the_learning_rate_under_an_unchanging_gradient():
    optimizer = registry.get("optimizers", "adamw").make(1e-3)
    weights = [{"w": mx.zeros(4)}]
    optimizer.init(weights[0])
    for _ in range(5):
        weights.append(
            optimizer.apply_gradients({"w": mx.array([1e-2, -1.0, 3.0, -50.0])}, weights[-1])
        )
    for old, new in zip(weights, weights[1:], strict=False):
        assert mx.abs(mx.abs(new["w"] - old["w"]) / 1e-3 - 1).max().item() < 1e-2


@on_mlx
def test_muon_makes_every_matrix_of_a_stack_orthogonal_by_itself():
    kind = registry.get("optimizers", "muon")
    weight, gradient = (mx.random.normal((3, 8, 16), key=mx.random.key(n)) for n in (7, 8))
    new, kept = stepped(kind, weight, gradient)
    for n in range(3):
        alone, own = stepped(kind, weight[n], gradient[n])
        assert mx.allclose(new[n], alone, atol=1e-6) and mx.allclose(kept["w.v"][n], own["w.v"])
