"""The peak of a real training step, run once as the training loop runs it."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from qlab.core.config.train import TrainConfig
from qlab.core.memory.setup import Setup
from qlab.engine.adapt.attach import attach
from qlab.engine.models.skeleton import describe
from qlab.engine.step.choose import make_step
from qlab.engine.step.protocol import Arrays, LossAndGradients, StepBatch
from qlab.engine.train.update import Update
from qlab.nn.frozen import usual_compute


def measured_peak(module: nn.Module, setup: Setup) -> int:
    """Run one training step on random tokens and return the bytes of its peak.

    Whatever else MLX holds in memory is not counted.

    Args:
        module: the model, loaded, and stored as it is to be trained. It is not changed.
        setup: adapter and run; its plan does not count.
    """
    train = setup.train
    spec = describe(module, "")
    adapted = attach(module, spec, setup.adapter, usual_compute(), train.grad_checkpoint)
    step = make_step(adapted, train)
    update = Update(train, step.parameters)
    parameters = update.by_path(update.flat(step.parameters))
    state = update.state
    batch = _random_batch(train)
    rate = mx.array(train.learning_rate)
    # sums of earlier batches, which a step that accumulates adds to
    earlier = None
    if train.grad_accumulation_steps > 1:
        earlier = _zero_sums(parameters)

    weights: Arrays = dict(tree_flatten(adapted.parameters()))
    inputs = list(weights.values())
    inputs += state.values()
    inputs += [batch.tokens, batch.mask]
    if earlier is not None:
        inputs += earlier.grads.values()
    if batch.segments is not None:
        inputs.append(batch.segments)
    mx.eval(inputs, parameters)
    mx.clear_cache()
    # the step's inputs are in memory already: the rise above them is measured, and they are added
    input_nbytes = sum(array.nbytes for array in inputs)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    sums = step(parameters, batch)
    if earlier is not None:
        sums = earlier.plus(sums)
    gathered = update.gather(sums)
    del sums  # as in the loop, so that the update does not find the gradients still in use
    mx.eval(gathered)
    updated = update(parameters, state, gathered, rate)
    mx.eval(updated)
    rise = mx.get_peak_memory() - before
    return rise + input_nbytes


def _zero_sums(parameters: Arrays) -> LossAndGradients:
    zeros = {}
    for path, array in parameters.items():
        zeros[path] = mx.zeros_like(array)
    loss = mx.array(0.0)
    count = mx.array(0.0)
    return LossAndGradients(loss, zeros, count)


def _random_batch(train: TrainConfig) -> StepBatch:
    """Return a batch of the largest shape; which tokens it has changes no memory."""
    shape = (train.batch_size, train.max_seq_length)
    tokens = mx.random.randint(0, 2, shape)
    mask = mx.ones(shape, mx.int32)
    key = mx.random.key(0)
    segments = None
    if train.pack:
        segments = mx.ones(shape, mx.int32)
    return StepBatch(tokens, mask, key, segments)
