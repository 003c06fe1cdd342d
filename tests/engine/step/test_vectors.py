"""Arrays joined as vectors: what comes back is what went in, in any order, and one vector's update is that of all arrays."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.optimizers as optim
import pytest

from qlab import registry
from qlab.core.config.train import TrainConfig
from qlab.engine.step.vectors import FlatViews
from qlab.engine.step.vectors import FlatLayout
from qlab.engine.step.vectors import cast
from qlab.engine.step.protocol import LossAndGradients
from qlab.engine.memory.read_graph import read
from qlab.engine.train.update import Update
from tests.tiny import on_mlx

ELEMENTWISE = [kind.name for kind in registry.shelf("optimizers").values() if kind.elementwise]
STOCK = {
    "adamw": lambda: optim.AdamW(3e-3, weight_decay=0.1, bias_correction=True),
    "lion": lambda: optim.Lion(3e-3, weight_decay=0.1),
}
SHAPES = [(5, 3), (7,), (4, 16), (2, 3, 4), (1,)]


def arrays(seed: int = 0, dtypes=(mx.float32,)) -> dict[str, mx.array]:
    keys = mx.random.split(mx.random.key(seed), len(SHAPES))
    made = [mx.random.normal(shape, key=key) for shape, key in zip(SHAPES, keys, strict=True)]
    return {f"layers.{i}.w": array.astype(dtypes[i % len(dtypes)]) for i, array in enumerate(made)}


def same(one: dict[str, mx.array], two: dict[str, mx.array]) -> bool:
    alike = all(
        one[path].dtype == two[path].dtype and mx.array_equal(one[path], two[path]).item()
        for path in two
    )
    return one.keys() == two.keys() and alike


def updates(update: Update, parameters, count: int = 4, dtype: mx.Dtype = mx.float32):
    """Return what a few updates make, each by other gradients."""
    state = update.state
    for number in range(count):
        grads = {path: grad.astype(dtype) for path, grad in arrays(number + 1).items()}
        new = update(
            parameters, state, LossAndGradients(mx.array(1.0), grads, mx.array(3.0)), mx.array(3e-3)
        )
        mx.eval(new)
        parameters, state = new.parameters, new.state
    return parameters, state


@on_mlx
def test_arrays_come_back_as_they_went_in_whatever_their_order():
    given = arrays(dtypes=(mx.float32, mx.bfloat16))
    layout, turned = FlatLayout(given), FlatLayout(dict(reversed(given.items())))
    vectors = layout.vectors(given)
    assert {name: (v.ndim, v.dtype) for name, v in vectors.items()} == {
        name: (1, d) for name, d in layout.dtypes.items()
    }
    assert same(layout.views(vectors), given)
    assert same(turned.vectors(given), vectors)


@on_mlx
def test_every_view_begins_at_a_multiple_of_the_power_of_two_that_divides_its_rows():
    shapes = [(97,), (576, 1), (1, 64), (64, 16), (97, 4), (16, 48), (1,), (6, 10)]
    layout = FlatLayout({str(i): mx.zeros(shape) for i, shape in enumerate(shapes)})
    views = layout.views({"float32": mx.arange(sum(math.prod(shape) for shape in shapes))})
    for i, shape in enumerate(shapes):
        assert views[str(i)].shape == shape
        assert views[str(i)].flatten()[0].item() % (shape[-1] & -shape[-1]) == 0


@on_mlx
def test_what_was_handed_out_is_known_again_and_anything_else_is_joined_anew():
    given = arrays()
    layout = FlatLayout(given)
    vectors = layout.vectors(given)
    views = FlatViews(layout.views(vectors), layout, vectors)
    assert layout.vectors(views) is vectors
    changed = {**views, "layers.1.w": views["layers.1.w"] + 1}
    assert same(layout.views(layout.vectors(changed)), changed)
    other = FlatLayout(given)  # may lie otherwise, for all it knows
    assert other.vectors(views) is not vectors and same(other.vectors(views), vectors)


@pytest.mark.parametrize(
    "change", [lambda a: a.update(x=1), lambda a: a.pop("x"), lambda a: a.__setitem__("x", 1)]
)
@on_mlx
def test_views_cannot_be_changed_behind_the_back_of_their_vectors(change):
    given = arrays()
    layout = FlatLayout(given)
    with pytest.raises(TypeError, match="make a dict"):
        change(FlatViews(given, layout, layout.vectors(given)))


@on_mlx
def test_views_are_cast_by_one_operation():
    given = arrays()
    layout, paths = FlatLayout(given), sorted(given)[:3]
    for form in (given, FlatViews(given, layout, layout.vectors(given))):
        assert same(
            cast(form, mx.bfloat16, paths),
            {path: given[path].astype(mx.bfloat16) for path in paths},
        )
    (vector,) = layout.vectors(given).values()

    def run(vector):
        return list(cast(FlatViews({}, layout, {"float32": vector}), mx.bfloat16, paths).values())

    assert [node.name for node in read(run, [vector]).nodes].count("AsType") == 1
    assert cast(given, mx.bfloat16, ()) == {}


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("optimizer", ELEMENTWISE)
@on_mlx
def test_one_vector_is_updated_bit_for_bit_as_separate_arrays_by_mlx(optimizer, dtype):
    config = TrainConfig(
        optimizer=optimizer, learning_rate=3e-3, weight_decay=0.1, max_grad_norm=0.0
    )
    given = arrays(dtypes=(mx.float32, mx.bfloat16))
    update = Update(config, given)
    parameters, state = updates(update, given, dtype=dtype)
    stock, wanted = STOCK[optimizer](), given
    stock.init(given)
    for number in range(4):
        share = 1 / mx.array(3.0)
        mean = {
            path: grad.astype(dtype).astype(mx.float32) * share
            for path, grad in arrays(number + 1).items()
        }
        wanted = stock.apply_gradients(
            {path: grad.astype(given[path].dtype) for path, grad in mean.items()}, wanted
        )
    assert same(parameters, wanted)
    found = update.state_by_path(state)
    kept = {f"{path}.{name}": array for path in given for name, array in stock.state[path].items()}
    assert same({name: found[name] for name in kept}, kept)
    assert found.keys() == {*kept, "step", "learning_rate"}


@pytest.mark.parametrize("optimizer", registry.shelf("optimizers"))
@on_mlx
def test_a_state_comes_back_from_what_is_written(optimizer):
    update = Update(TrainConfig(optimizer=optimizer), arrays())
    _, state = updates(update, arrays())
    again = update.state_from_paths(dict(reversed(update.state_by_path(state).items())))
    assert same(again, state) and list(again) == list(update.state)


@pytest.mark.parametrize("optimizer", ELEMENTWISE)
@on_mlx
def test_hundreds_of_arrays_take_as_many_operations_as_two_but_for_joining_them(optimizer):
    def operations(count: int) -> list[str]:
        given = {f"{i:03}": mx.zeros((4, 4)) for i in range(count)}
        update, number = Update(TrainConfig(optimizer=optimizer), given), mx.array(0.0)
        kept, state = update.flat(given), update.state

        def run(*all_):
            left = iter(all_)
            own, before, grads = (
                {name: next(left) for name in group} for group in (kept, state, given)
            )
            new = update(
                update.by_path(own),
                before,
                LossAndGradients(next(left), grads, next(left)),
                next(left),
            )
            return [
                *new.parameters.values(),
                *new.state.values(),
                new.loss,
                new.grad_norm,
                new.finite,
            ]

        graph = read(
            run, [*kept.values(), *state.values(), *given.values(), number, number, number]
        )
        return [node.name for node in graph.nodes if node.name not in ("Reshape", "Split", "Slice")]

    assert operations(2) == operations(200)


@on_mlx
def test_an_update_goes_on_from_other_parameters_than_its_own():
    given = arrays()
    update = Update(TrainConfig(), given)
    parameters, state = updates(update, given, 1)
    other = {path: array + 1 for path, array in parameters.items()}
    sums = LossAndGradients(mx.array(1.0), arrays(9), mx.array(3.0))
    moved = update(other, state, sums, mx.array(3e-3)).parameters
    assert all(
        mx.allclose(moved[path] - 1, array, atol=1e-2).item() for path, array in parameters.items()
    )
    plain = update(dict(parameters), state, sums, mx.array(3e-3))
    assert same(plain.parameters, update(parameters, state, sums, mx.array(3e-3)).parameters)


@on_mlx
def test_sums_gathered_before_make_the_same_step():
    given = arrays()
    update = Update(TrainConfig(), given)
    sums = LossAndGradients(mx.array(6.0), arrays(9), mx.array(3.0))
    gathered = update.gather(sums)
    mx.eval(gathered)
    assert gathered.norm.item() == pytest.approx(
        sum(mx.square(a).sum().item() for a in sums.grads.values()) ** 0.5
    )
    one, two = (update(given, update.state, which, mx.array(3e-3)) for which in (sums, gathered))
    assert same(one.parameters, two.parameters) and same(one.state, two.state)
    assert (one.loss.item(), one.grad_norm.item()) == (
        two.loss.item(),
        two.grad_norm.item(),
    ) and two.loss.item() == 2


@on_mlx
def test_an_update_is_compiled_once_whatever_parameters_it_is_given():
    traced = []

    class Counted(Update):
        def _apply(self, *args):
            traced.append(1)
            return super()._apply(*args)

    given = arrays()
    parameters, _ = updates(update := Counted(TrainConfig(), given), given, 3)
    updates(update, dict(parameters), 2)
    assert len(traced) == 1
