"""A step taken a block at a time gives the numbers of the whole graph, whatever the model, and compiles few functions."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from qlab import registry
from qlab.core.config.quant import QuantConfig
from qlab.core.config.lora import LoRAConfig
from qlab.core.config.train import TrainConfig
from qlab.engine.step.block import array_places
from qlab.engine.step.block import castable_parameters
from qlab.engine.models.skeleton import describe
from qlab.nn.frozen import Compute
from qlab.engine.step.whole import WholeGraphStep
from qlab.engine.adapt.attach import attach
from qlab.engine.step.choose import make_step
from qlab.engine.step.blockwise import BlockwiseStep
from qlab.engine.step.blockwise import _InFlight, padded_size
from qlab.errors import ConfigError
from qlab.errors import UnsupportedError
from qlab.engine.step.protocol import StepBatch
from tests.engine.step.test_whole import HEADS, WHOLE, assert_same, batch, label, made, stirred
from tests.tiny import ARCHITECTURES, on_mlx, quantized, tiny

SCHEMES = [None, *(QuantConfig(name) for name in registry.shelf("schemes"))]
TRAIN = TrainConfig(grad_checkpoint=True, loss_chunk=7)
KEY = (3, 4)


def stepped(module, spec, lora, train=TRAIN, compute=None, window=None) -> BlockwiseStep:
    mx.random.seed(5)
    train = replace(train, window=window or 0)
    return make_step(
        attach(module, spec, lora, compute or Compute(None, True), True), train, how="stepped"
    )


def both(module, spec, lora, train=TRAIN, compute=None, key=None, given=None, window=None):
    """Return what stepping gives, what the whole graph gives, and the step."""
    step = stepped(module, spec, lora, train, compute, window)
    parameters = stirred(step.parameters)
    whole = made(module, spec, lora, WHOLE, compute)
    found, expected = (
        one(parameters, StepBatch(*(given or batch()), key)) for one in (step, whole)
    )
    mx.eval(found, expected)
    return found, expected, step


@pytest.mark.parametrize("kind", registry.shelf("adapters"))
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("storage", SCHEMES, ids=label)
@on_mlx
def test_the_same_for_every_scheme_adapter_and_head(storage, head, kind):
    module, spec = tiny(**HEADS[head])
    module = quantized(module, spec, storage)
    found, expected, step = both(module, describe(module, "tiny"), LoRAConfig(rank=4, kind=kind))
    assert_same(found, expected)
    assert found.count.item() == expected.count.item() and step.how == "stepped"


@pytest.mark.parametrize("name", ARCHITECTURES)
@on_mlx
def test_the_same_for_every_architecture(name):
    module, spec = tiny(name)
    found, expected, step = both(module, spec, LoRAConfig(rank=4))
    assert_same(found, expected, 3e-5)
    assert step.traces <= 6  # a pair for each kind of block, two sizes of chunk


@pytest.mark.parametrize(
    "lora",
    [
        LoRAConfig(rank=4, num_layers=1),
        LoRAConfig(rank=2, num_layers=2, keys=("q_proj", "down_proj")),
        LoRAConfig(rank=4, keys="model.layers.1.*"),
        LoRAConfig(rank=4, keys=("lm_head", "v_proj")),
        LoRAConfig(rank=4, keys="lm_head"),
        LoRAConfig(rank=4, keys=("embed_tokens", "v_proj")),
        LoRAConfig(rank=4, keys="embed_tokens"),
    ],
    ids=lambda x: f"{x.num_layers}-{x.keys}",
)
@pytest.mark.parametrize("head", HEADS)
@on_mlx
def test_the_same_with_adapters_on_some_layers_only(head, lora):
    if head == "tied" and lora.keys and "lm_head" in lora.keys:
        pytest.skip("there is no such layer")
    module, spec = tiny(**HEADS[head])
    module = quantized(module, spec, QuantConfig("nf4"))
    found, expected, _ = both(module, describe(module, "tiny"), lora)
    assert_same(found, expected)


@pytest.mark.parametrize("kind", registry.shelf("adapters"))
@on_mlx
def test_with_the_same_key_the_same_inputs_are_dropped(kind):
    module, spec = tiny()
    lora = LoRAConfig(rank=4, dropout=0.2, kind=kind)
    found, expected, step = both(module, spec, lora, key=mx.random.key(9))
    assert_same(found, expected)
    other = step(stirred(step.parameters), StepBatch(*batch(), mx.random.key(8)))
    assert other.loss.item() != pytest.approx(found.loss.item(), rel=1e-5)
    with pytest.raises(ValueError, match="needs a key"):
        step(step.parameters, StepBatch(*batch()))


@pytest.mark.parametrize(
    "compute", [Compute(mx.bfloat16, True), Compute(None, False)], ids=["bfloat16", "kernel"]
)
@on_mlx
def test_the_same_however_products_are_made(compute):
    module, spec = tiny(torch_dtype="bfloat16") if compute.dtype else tiny()
    module = quantized(module, spec, QuantConfig())
    found, expected, _ = both(module, describe(module, "tiny"), LoRAConfig(rank=4), compute=compute)
    assert_same(found, expected, 0.05 if compute.dtype else 1e-5)


@pytest.mark.parametrize("chunk", [0, 1, 5, 512])
@pytest.mark.parametrize("window", [1, 2, 8])
@on_mlx
def test_the_same_whatever_the_window_and_the_chunk(window, chunk):
    module, spec = tiny()
    train = TrainConfig(grad_checkpoint=True, loss_chunk=chunk)
    found, expected, step = both(module, spec, LoRAConfig(rank=4), train, window=window)
    assert_same(found, expected)
    assert f"window {window}" in step.notes[0]


@on_mlx
def test_a_batch_without_targets_adds_nothing():
    module, spec = tiny()
    step = stepped(module, spec, LoRAConfig(rank=4))
    tokens, mask = batch()
    found = step(stirred(step.parameters), StepBatch(tokens, mx.zeros_like(mask)))
    assert found.loss.item() == found.count.item() == 0
    assert found.grads.keys() == step.parameters.keys()
    assert all(mx.abs(grad).max().item() == 0 for grad in found.grads.values())


@on_mlx
def test_nothing_is_compiled_twice_for_depth_steps_or_numbers_of_targets():
    traces = []
    for depth in (3, 6):
        module, spec = tiny(num_hidden_layers=depth)
        step = stepped(
            module, spec, LoRAConfig(rank=4), TrainConfig(grad_checkpoint=True, loss_chunk=512)
        )
        tokens, mask = batch()
        for n in range(1, 12):
            mx.eval(step(step.parameters, StepBatch(tokens, mask * (mx.arange(13) <= n))))
        traces.append(step.traces)
    assert traces[0] == traces[1] <= 2 + 8
    mx.eval(step(step.parameters, StepBatch(tokens[:, :9], mask[:, :9])))
    assert step.traces <= traces[1] + 3  # another shape


@on_mlx
def test_no_more_than_the_inputs_of_blocks_that_a_gradient_reaches_is_kept():
    module, spec = tiny(num_hidden_layers=6)
    few, many = (stepped(module, spec, LoRAConfig(rank=4, num_layers=n)) for n in (1, 6))
    tokens, _ = batch()
    for step, expected in [(few, 1), (many, 6)]:
        x, calls = step._stack.before(tokens)
        plans = [step._plan(i, call, x) for i, call in enumerate(calls)]
        assert len(step._forward(x, plans, _InFlight())) == expected + 1


@on_mlx
def test_gradients_of_the_part_that_comes_last_are_handed_over_first():
    module, spec = tiny()
    for keys, expected in [
        (None, "mlp."),
        (["q_proj"], None),
        (["q_proj", "gate_proj"], "mlp.gate_proj"),
    ]:
        step = stepped(module, spec, LoRAConfig(rank=4, keys=keys))
        block = step._blocks[1]
        assert set(block.half_step) <= set(block.trained)
        assert all(path.startswith(f"model.layers.1.{expected}") for path in block.half_step)
        assert bool(block.half_step) == (expected is not None)


@on_mlx
def test_fewer_than_a_window_of_what_is_handed_over_is_unfinished(monkeypatch):
    flight, waits, real = _InFlight(), [], mx.eval
    monkeypatch.setattr(mx, "eval", lambda array: (waits.append(array.item()), real(array)))
    for n, window in enumerate((4, 4, 4, 2, 2, 4, 1)):
        flight.add(window, mx.array(n) + 0)
    assert waits == [0, 1, 2, 3, 4, 5, 6]
    assert len(flight._unfinished) == 0


@pytest.mark.parametrize("size", [1, 7, 512])
def test_a_last_chunk_is_padded_to_one_of_a_few_sizes_that_hold_it(size):
    sizes = {padded_size(count, size, 8) for count in range(1, size + 1)}
    assert len(sizes) <= 8 and max(sizes) == size
    assert all(count <= padded_size(count, size, 8) <= size for count in range(1, size + 1))


class Block(nn.Module):
    def __init__(self, number: int, layer_idx: int, minds: bool) -> None:
        super().__init__()
        self.linear, self.layer_idx = nn.Linear(64, 64), layer_idx
        self._minds = minds

    def __call__(self, x):
        return x + self.linear(x) * (1 + self.layer_idx if self._minds else 1)


class Model(nn.Module):
    """A model whose blocks know where they stand, and may mind."""

    def __init__(self, minds: bool, run=None) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(61, 64), nn.Linear(64, 61)
        self.layers = [Block(i, i, minds) for i in range(3)]
        self._run = run or (lambda block, x: block(x))

    def __call__(self, tokens, cache=None):
        x = self.embed(tokens)
        for block in self.layers:
            x = self._run(block, x)
        return self.head(x)


@pytest.mark.parametrize(("minds", "traces"), [(False, 2), (True, 6)])
@on_mlx
def test_a_blocks_number_makes_it_another_kind_only_if_it_minds(minds, traces):
    mx.random.seed(1)
    module = Model(minds)
    tokens, mask = batch()
    found, expected, step = both(
        module, describe(module, "m"), LoRAConfig(rank=4), given=(tokens % 61, mask)
    )
    assert_same(found, expected)
    assert step.traces - traces in (1, 2)  # and the chunks


@on_mlx
def test_a_model_that_does_more_with_its_blocks_falls_back_and_says_why():
    mx.random.seed(1)
    module = Model(False, run=lambda block, x: x + 0.5 * block(x))
    spec, lora = describe(module, "m"), LoRAConfig(rank=4)
    twin = attach(module, spec, lora, Compute(None, True), False)
    with pytest.raises(UnsupportedError, match="more with its blocks"):
        make_step(twin, WHOLE, how="stepped")
    step = make_step(attach(module, spec, lora, Compute(None, True), True), TRAIN)
    assert step.how == "whole" and "more with its blocks" in step.notes[0]


@on_mlx
def test_who_asks_for_checkpoints_is_stepped_and_others_are_not():
    module, spec = tiny()
    ways = {}
    for again in (True, False):
        twin = attach(module, spec, LoRAConfig(rank=4), Compute(None, True), again)
        step = make_step(twin, TrainConfig(grad_checkpoint=again))
        ways[again] = step.how
        assert step.notes and all(isinstance(note, str) for note in step.notes)
    assert ways == {True: "stepped", False: "whole"}
    assert isinstance(make_step(twin, TRAIN, how="whole"), WholeGraphStep)
    with pytest.raises(ConfigError, match="how='fast'"):
        make_step(twin, TRAIN, how="fast")


@on_mlx
def test_without_the_compiler_the_numbers_are_the_same():
    module, spec = tiny()
    mx.disable_compile()
    try:
        found, expected, _ = both(module, spec, LoRAConfig(rank=4))
    finally:
        mx.enable_compile()
    assert_same(found, expected)


@on_mlx
def test_the_model_itself_is_left_as_it_was():
    module, spec = tiny()
    arrays = dict(tree_flatten(module.parameters()))
    step = stepped(module, spec, LoRAConfig(rank=4, dropout=0.2))
    parameters = stirred(step.parameters)
    mx.eval(step(parameters, StepBatch(*batch(), mx.random.key(1))))
    now = dict(tree_flatten(module.parameters()))
    assert now.keys() == arrays.keys() and all(now[path] is arrays[path] for path in arrays)
    held = dict(tree_flatten(step.module.trainable_parameters()))
    assert held.keys() == parameters.keys() and all(held[path] is parameters[path] for path in held)


@on_mlx
def test_the_loss_curve_of_many_updates_is_that_of_the_whole_graph():
    from qlab.engine.train.update import Update

    module, spec = tiny()
    curves = []
    for how in ("stepped", "whole"):
        mx.random.seed(5)
        train = TrainConfig(grad_checkpoint=how == "stepped", loss_chunk=7, learning_rate=3e-3)
        step = make_step(
            attach(module, spec, LoRAConfig(rank=4), Compute(None, True), True), train, how=how
        )
        update = Update(train, step.parameters)
        parameters, state, losses = step.parameters, update.state, []
        for _ in range(200):
            new = update(parameters, state, step(parameters, StepBatch(*batch())), mx.array(3e-3))
            mx.eval(new)
            parameters, state = new.parameters, new.state
            losses.append(new.loss.item())
        curves.append(losses)
    assert curves[0] == pytest.approx(curves[1], rel=1e-4) and curves[0][-1] < curves[0][0]


@pytest.mark.parametrize("kind", ["lora", "dora"])
@on_mlx
def test_factors_are_cast_once_a_step_where_nothing_but_products_reads_them(kind):
    module, spec = tiny(torch_dtype="bfloat16")
    step = stepped(module, spec, LoRAConfig(kind=kind, rank=4))
    found = castable_parameters(array_places(step.module), "model.layers.", step.parameters)
    factors = sorted(path for path in step.parameters if path.endswith(("lora_a", "lora_b")))
    assert (
        sorted(found.get(mx.bfloat16, [])) == (factors if kind == "lora" else []) and len(found) < 2
    )
    sums = step(step.parameters, StepBatch(*batch()))
    assert {sums.grads[path].dtype for path in factors} == {
        mx.bfloat16 if kind == "lora" else mx.float32
    }
    assert {grad.dtype for grad in sums.in_dtypes_of(step.parameters).grads.values()} == {
        mx.float32
    }
    wide, spec = tiny()
    wide.model.embed_tokens.weight = wide.model.embed_tokens.weight.astype(
        mx.bfloat16
    )  # and norms that make it wider
    places = array_places(stepped(wide, spec, LoRAConfig(rank=4)).module)
    assert mx.bfloat16 not in castable_parameters(places, "model.layers.", step.parameters)
