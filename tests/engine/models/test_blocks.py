"""A model taken apart and run in pieces must give what it gives in one piece, and be whole again afterwards."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from qlab.core.config.lora import LoRAConfig
from qlab.core.config.train import TrainConfig
from qlab.engine.models.blocks import BlockStack
from qlab.nn.frozen import Compute
from qlab.engine.adapt.attach import attach
from qlab.engine.step.choose import make_step
from qlab.engine.models.surgery import module_at
from qlab.errors import UnsupportedError
from qlab.engine.step.protocol import StepBatch
from tests.tiny import ARCHITECTURES, on_mlx, tiny


def tokens() -> mx.array:
    return mx.random.randint(0, 97, (2, 11), key=mx.random.key(1))


def blocks(stack: BlockStack) -> list[nn.Module]:
    """The blocks that stand in the model now."""
    return module_at(stack.module, stack.path)


class Block(nn.Module):
    """The least that a block can be."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def __call__(self, x):
        return x + self.linear(x)


class Model(nn.Module):
    """A model that runs its blocks as told, between an embedding and a head."""

    def __init__(self, run) -> None:
        super().__init__()
        self.embed, self.layers, self.head, self._run = (
            nn.Embedding(16, 8),
            [Block() for _ in range(3)],
            nn.Linear(8, 16),
            run,
        )

    def __call__(self, tokens):
        return self.head(self._run(self.layers, self.embed(tokens)))


@pytest.mark.parametrize("name", ARCHITECTURES)
@on_mlx
def test_pieces_one_after_the_other_give_exactly_the_models_own_logits(name):
    module, _ = tiny(name)
    expected = module(tokens())
    stack = BlockStack(module)
    assert len(stack.blocks) == 3
    x, calls = stack.before(tokens())
    assert x.shape == (2, 11, 64)
    for block, (args, kwargs) in zip(stack.blocks, calls, strict=True):
        x = block(x, *args, **kwargs)
    assert mx.array_equal(stack.after(x), expected)
    assert mx.abs(stack.after(x + 0.1 * mx.arange(64)) - expected).max().item() > 1e-3


@pytest.mark.parametrize("name", ARCHITECTURES)
@on_mlx
def test_the_model_is_whole_afterwards(name):
    module, _ = tiny(name)
    expected, arrays = module(tokens()), tree_flatten(module.parameters())
    own = list(BlockStack(module).blocks)
    stack = BlockStack(module)
    hidden, _ = stack.before(tokens())
    stack.after(hidden)
    assert all(a is b for a, b in zip(blocks(stack), own, strict=True))
    assert all(
        p == q and a is b
        for (p, a), (q, b) in zip(tree_flatten(module.parameters()), arrays, strict=True)
    )
    assert mx.array_equal(module(tokens()), expected)


@on_mlx
def test_the_model_is_whole_afterwards_also_when_an_error_is_raised_inside():
    module, _ = tiny()
    expected, stack = module(tokens()), BlockStack(module)
    with pytest.raises(ValueError):
        stack.after(mx.zeros((2, 11, 63)))
    assert all(a is b for a, b in zip(blocks(stack), stack.blocks, strict=True))
    with pytest.raises(UnsupportedError, match="cannot be taken apart into its blocks: .*integral"):
        stack.before(mx.zeros((2, 11)))  # not integers
    assert all(a is b for a, b in zip(blocks(stack), stack.blocks, strict=True))
    assert mx.array_equal(module(tokens()), expected)


@on_mlx
def test_no_block_runs_in_what_stands_before_and_after(monkeypatch):
    module, _ = tiny()
    stack, ran = BlockStack(module), []
    hidden, _ = stack.before(tokens())
    monkeypatch.setattr(type(stack.blocks[0]), "__call__", lambda *_, **__: ran.append(1))
    stack.before(tokens())
    stack.after(hidden)
    assert ran == []
    stack.blocks[0](hidden)
    assert ran == [1]


@on_mlx
def test_what_follows_may_be_asked_of_any_rows():
    module, _ = tiny("gemma2")
    stack = BlockStack(module)
    hidden = mx.random.normal((2, 11, 64), key=mx.random.key(2))
    whole = stack.after(hidden)
    part = stack.after(hidden.reshape(1, 22, 64)[:, 5:9])
    assert part.shape == (1, 4, 97)
    assert mx.allclose(part, whole.reshape(1, 22, 97)[:, 5:9], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("last", ["norms", "layers"])
@on_mlx
def test_the_list_with_the_most_in_it_is_the_one_of_the_blocks(last):
    module = Model(lambda layers, x: layers[2](layers[1](layers[0](x))))
    module.norms = [nn.RMSNorm(8) for _ in range(4)]
    module[last] = module.pop(last)
    stack = BlockStack(module)
    assert stack.path == "layers" and all(
        a is b for a, b in zip(stack.blocks, module.layers, strict=True)
    )


@on_mlx
def test_a_model_without_a_list_of_blocks_is_refused():
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.block, self.numbers, self.none = (
                nn.Embedding(16, 8),
                Block(),
                [mx.zeros(3)],
                [],
            )

    with pytest.raises(UnsupportedError, match="no list of blocks"):
        BlockStack(Flat())


@pytest.mark.parametrize(
    ("run", "match"),
    [
        (lambda layers, x: layers[0](x), "calls 1 of its 3 blocks"),
        (
            lambda layers, x: layers[2](layers[1](layers[0](layers[0](x)))),
            "calls 4 of its 3 blocks",
        ),
        (lambda layers, x: layers[2](layers[1](layers[0]((x, x)))), "do not pass one hidden state"),
        (lambda layers, x: layers[2](layers[1](layers[0](x[0]))), "do not pass one hidden state"),
        (lambda layers, x: layers[2](layers[1](layers[0](x)[0])), "do not pass one hidden state"),
    ],
    ids=["skips", "repeats", "two states", "no batch", "a row of it"],
)
@on_mlx
def test_blocks_that_are_not_called_once_each_with_one_hidden_state_are_refused(run, match):
    stack = BlockStack(Model(run))
    with pytest.raises(UnsupportedError, match=match):
        stack.before(mx.array([[1, 2, 3]]))
    assert all(a is b for a, b in zip(blocks(stack), stack.blocks, strict=True))


@on_mlx
def test_blocks_whose_class_mlx_lm_has_changed_for_checkpoints_are_stepped_through_all_the_same():
    from mlx_lm.models.llama import TransformerBlock
    from mlx_lm.tuner.trainer import grad_checkpoint

    module, spec = tiny()
    train = TrainConfig(batch_size=2, max_seq_length=11, grad_checkpoint=True)

    def grads():
        mx.random.seed(5)
        step = make_step(
            attach(module, spec, LoRAConfig(rank=2), Compute(None, False), True), train
        )
        found = step(step.parameters, StepBatch(tokens(), mx.ones((2, 11), mx.int32)))
        assert step.how == "stepped" and len({type(block) for block in step._stack.blocks}) == 1
        mx.eval(found)
        return found

    expected, plain = grads(), TransformerBlock.__call__
    try:
        grad_checkpoint(module.layers[0])
        found = grads()
        assert (
            type(module.layers[0]) is TransformerBlock and TransformerBlock.__call__ is not plain
        )  # mlx-lm's is left
    finally:
        TransformerBlock.__call__ = plain
    assert found.loss.item() == expected.loss.item()
    assert all(mx.array_equal(found.grads[path], expected.grads[path]) for path in expected.grads)
