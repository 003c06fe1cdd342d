"""Several CUDA cards train as one: tokens/s of a global batch shared by the processes that ``mlx.launch`` starts.

``mlx.launch -n 2 python -m tests.bench.cuda_parallel [1b|4b|8b] [rows of the global batch] [steps]``, and the same with ``-n 1`` for
comparison. One line: tokens/s, peak memory of a card, the last loss, which must not depend on the number of processes. Weights are
random and the same everywhere.
"""

from __future__ import annotations

import sys

import qlab  # noqa: F401

import mlx.core as mx

from qlab.core.config.quant import QuantConfig
from qlab.core.train.events import StepEvent
from qlab.core.config.lora import LoRAConfig
from qlab.core.config.train import TrainConfig
from qlab.engine.adapt.parameters import fresh
from qlab.engine.data.batches import Feed
from qlab.runtime.job import mlx_call
from qlab.engine.train.distributed import joined
from qlab.engine.train.setup import check_shared
from qlab.engine.train.inputs import RunInputs
from qlab.engine.train.setup import prepare_run
from qlab.engine.models.skeleton import describe
from qlab.engine.train.loop import train_steps
from tests.bench.cuda_step import RANK, SHAPES, random_model, random_rows

_WARM = 4  # steps that are not counted


def measured(name: str, batch: int, steps: int) -> str:
    """Train and return the line; empty in all processes but the first."""
    ranks = joined()
    _, length, settings = SHAPES[name]
    config = TrainConfig(
        iters=_WARM + steps, batch_size=batch, max_seq_length=length + 1, grad_checkpoint=True
    )
    check_shared(config, ranks.size)
    mx.random.seed(0)
    module = random_model(settings, QuantConfig(bits=4))
    spec, lora = describe(module, name), LoRAConfig(rank=RANK)
    feed = Feed(random_rows(module, 8 * batch, length), config)
    parameters = ranks.from_first(fresh(module, spec, lora, 0))
    inputs = RunInputs(
        module=module,
        spec=spec,
        lora=lora,
        config=config,
        feed=feed,
        held_out=None,
        parameters=parameters,
        ranks=ranks,
    )
    task, state, _ = prepare_run(inputs, lambda state: None)
    events = [event for event in train_steps(task, state) if isinstance(event, StepEvent)]
    speeds = sorted(event.tokens_per_second for event in events[_WARM:])
    return ranks.first * (
        f"{name}, {batch} × {length} over {ranks.size}: {speeds[len(speeds) // 2]:,.0f} tokens/s"
        f" ({speeds[0]:,.0f}–{speeds[-1]:,.0f}), {events[-1].peak_nbytes / 1e9:.2f} GB a card, loss {events[-1].loss:.6f}\n"
    )


if __name__ == "__main__":
    name, batch, steps = [*sys.argv[1:], *("1b", "8", "20")[len(sys.argv) - 1 :]]
    sys.stdout.write(mlx_call(measured, name, int(batch), int(steps)))
