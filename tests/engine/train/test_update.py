"""One optimizer step: what follows from the sums over its batches."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from qlab import registry
from qlab.core.config.quant import QuantConfig
from qlab.core.config.lora import LoRAConfig
from qlab.core.config.train import TrainConfig
from qlab.nn.frozen import Compute
from qlab.engine.step.whole import WholeGraphStep
from qlab.engine.step.protocol import LossAndGradients, StepBatch
from qlab.engine.adapt.attach import attach
from qlab.engine.train.update import Update
from tests.engine.step.test_whole import VARIANTS, WHOLE, batch, label, model, stirred
from tests.tiny import on_mlx


RATE = 3e-3


class Updating:
    """A step and the update that follows from it."""

    def __init__(self, optimizer: str, train: TrainConfig, **settings) -> None:
        module, spec, _ = model(QuantConfig("affine", 4))
        mx.random.seed(7)
        config = replace(train, learning_rate=RATE, optimizer=optimizer)
        twin = attach(
            module, spec, LoRAConfig(rank=4, **settings), Compute(None, True), train.grad_checkpoint
        )
        self.step = WholeGraphStep(twin, config)
        self.update = Update(config, self.step.parameters)
        self.state = self.update.state

    def __call__(self, parameters, state, tokens, mask, rate: float = RATE):
        return self.update(
            parameters, state, self.step(parameters, StepBatch(tokens, mask)), mx.array(rate)
        )


def unclipped(train: TrainConfig) -> TrainConfig:
    return replace(train, max_grad_norm=0.0)


@pytest.mark.parametrize(
    ("optimizer", "train"),
    [
        *((name, VARIANTS[-1]) for name in registry.shelf("optimizers")),
        *(("adamw", train) for train in VARIANTS[:-1]),
    ],
    ids=label,
)
@on_mlx
def test_twenty_updates_on_one_batch_lower_the_loss(optimizer, train):
    update = Updating(optimizer, train, num_layers=2)
    parameters, state, losses = update.step.parameters, update.state, []
    for _ in range(20):
        new = update(parameters, state, *batch())
        mx.eval(new)
        parameters, state = new.parameters, new.state
        losses.append(new.loss.item())
    assert losses[0] == pytest.approx(4.6, abs=0.4)  # nats per token; guessing among 97
    assert losses[-1] < losses[0] - 0.1 and losses[10] < losses[0]
    assert state["step"].item() == 20 and parameters.keys() == update.step.parameters.keys()


@pytest.mark.parametrize("optimizer", registry.shelf("optimizers"))
@on_mlx
def test_an_update_follows_the_mean_gradient_of_a_target(optimizer):
    update = Updating(optimizer, unclipped(WHOLE))
    parameters = stirred(update.step.parameters)
    loss, grads, count = update.step(parameters, StepBatch(*batch()))
    found = update(parameters, update.state, *batch())
    assert found.loss.item() == pytest.approx(loss.item() / count.item(), rel=1e-6)
    plain = registry.get("optimizers", optimizer).make(RATE)
    mean = {path: grad / count.item() for path, grad in grads.items()}
    square = sum(mx.square(grad).sum().item() for grad in mean.values())
    assert found.grad_norm.item() == pytest.approx(square**0.5, rel=1e-5)
    expected = plain.apply_gradients(mean, parameters)  # a flat dictionary is a tree, too
    moments = dict(tree_flatten(plain.state))
    state = update.update.state_by_path(found.state)
    assert state.keys() == moments.keys() and found.parameters.keys() == expected.keys()
    for got, wanted in [(found.parameters, expected), (state, moments)]:
        assert all(mx.allclose(got[path], wanted[path], rtol=1e-4, atol=1e-9) for path in wanted)
    again = update(parameters, update.state, *batch())  # from where the first one started
    assert all(mx.array_equal(again.parameters[path], found.parameters[path]) for path in expected)


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
@on_mlx
def test_accumulated_batches_make_the_step_of_one_large_batch(optimizer):
    update = Updating(optimizer, WHOLE)
    parameters = stirred(update.step.parameters)
    tokens, mask = batch()
    whole = update(parameters, update.state, tokens, mask)
    first, second = (
        update.step(parameters, StepBatch(tokens[i : i + 1], mask[i : i + 1])) for i in (0, 1)
    )
    assert first.count.item() != second.count.item()
    found = update.update(parameters, update.state, second.plus(first), mx.array(RATE))
    assert found.loss.item() == pytest.approx(whole.loss.item(), rel=1e-5)
    for one, two in [(found.parameters, whole.parameters), (found.state, whole.state)]:
        assert all(mx.allclose(one[path], two[path], rtol=1e-3, atol=1e-6) for path in two)


@on_mlx
def test_clipping_scales_all_gradients_to_the_global_norm_and_reports_it_as_it_was():
    update = Updating("adamw", WHOLE)
    parameters = stirred(update.step.parameters)
    sums = update.step(parameters, StepBatch(*batch()))
    norm = update.update(parameters, update.state, sums, mx.array(RATE)).grad_norm.item()
    tight = Update(replace(WHOLE, max_grad_norm=norm / 4), parameters)
    quarter = LossAndGradients(
        sums.loss, {path: grad / 4 for path, grad in sums.grads.items()}, sums.count
    )
    free = Update(unclipped(WHOLE), parameters)
    found = tight(parameters, tight.state, sums, mx.array(RATE))
    wanted = free(parameters, free.state, quarter, mx.array(RATE))
    assert found.grad_norm.item() == pytest.approx(norm)
    assert all(
        mx.allclose(found.state[path], wanted.state[path], rtol=1e-4, atol=1e-12)
        for path in wanted.state
    )


@on_mlx
def test_the_learning_rate_is_the_one_of_the_step_and_decay_is_decoupled():
    update = Updating("adamw", WHOLE)
    parameters = stirred(update.step.parameters)
    still = update(parameters, update.state, *batch(), rate=0.0)
    assert all(mx.array_equal(still.parameters[path], array) for path, array in parameters.items())
    sums = update.step(parameters, StepBatch(*batch()))
    none = LossAndGradients(
        sums.loss, {path: mx.zeros_like(grad) for path, grad in sums.grads.items()}, sums.count
    )
    decaying = Update(replace(WHOLE, weight_decay=0.5), parameters)
    less = decaying(parameters, decaying.state, none, mx.array(0.1)).parameters
    assert all(
        mx.allclose(less[path], array * 0.95, rtol=1e-5) for path, array in parameters.items()
    )


@on_mlx
def test_an_update_without_targets_has_no_loss_and_no_nan():
    update = Updating("adamw", WHOLE)
    tokens, mask = batch()
    new = update(update.step.parameters, update.state, tokens, mx.zeros_like(mask))
    assert new.loss.item() == 0 and not any(
        mx.isnan(array).any().item() for array in new.parameters.values()
    )


@on_mlx
def test_dropout_without_a_key_is_refused():
    update = Updating("adamw", WHOLE, dropout=0.2)
    with pytest.raises(ValueError, match="needs a key"):
        update(update.step.parameters, update.state, *batch())
