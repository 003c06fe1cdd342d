"""The training loop: what a step takes over, when it validates and saves, how it ends, and that it resumes bit for bit."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from qlab.core.config.quant import QuantConfig
from qlab.core.progress import Progress
from qlab.core.train.rows import Row
from qlab.core.train.rows import Rows
from qlab.core.train.events import StepEvent
from qlab.core.config.lora import LoRAConfig
from qlab.core.config.train import TrainConfig
from qlab.engine.train import checkpoint
from qlab.engine.adapt.parameters import fresh
from qlab.engine.data.batches import Feed
from qlab.engine.train.distributed import ALONE
from qlab.engine.train.inputs import RunInputs
from qlab.engine.train.loop import train_steps
from qlab.engine.train.setup import prepare_run
from qlab.engine.train.task import Task
from qlab.errors import LoadError
from tests.tiny import on_mlx, quantized, tiny

CONFIG = TrainConfig(
    iters=12,
    batch_size=2,
    max_seq_length=24,
    learning_rate=3e-3,
    steps_per_eval=4,
    steps_per_save=5,
)


def rows(count: int = 24, seed: int = 0) -> Rows:
    draw = np.random.default_rng(seed)
    made = []
    for number in range(count):
        tokens = draw.integers(1, 97, draw.integers(6, 20)).astype(np.int32)
        mask = np.ones(tokens.size, np.uint8)
        mask[: draw.integers(1, 4)] = 0
        made.append(Row(number=number, tokens=tokens, mask=mask))
    return Rows(tuple(made))


def run(
    config: TrainConfig,
    folder=None,
    lora: LoRAConfig | None = None,
    held: int = 4,
    resume=None,
    limit=None,
    ranks=ALONE,
):
    """Return a task and its state, on a tiny 4-bit model."""
    module, spec = tiny()
    module = quantized(module, spec, QuantConfig("affine", 4))
    lora = lora or LoRAConfig(rank=4, dropout=0.1)
    train, held_out = rows().split(held, 0) if held else (rows(), None)
    parameters = checkpoint.read_parameters(resume) if resume else fresh(module, spec, lora, 7)
    inputs = RunInputs(
        module=module,
        spec=spec,
        lora=lora,
        config=config,
        feed=Feed(train, config),
        held_out=held_out,
        parameters=parameters,
        source="tiny",
        folder=folder,
        start_from=resume,
        ranks=ranks,
        limit_nbytes=limit,
    )
    good: list[int] = []
    task, state, _ = prepare_run(inputs, lambda state: good.append(state.step))
    return task, state


def finish(task: Task, state) -> tuple[list[StepEvent], str]:
    events, work = [], train_steps(task, state)
    while True:
        try:
            event = next(work)
        except StopIteration as end:
            return events, end.value
        if isinstance(event, StepEvent):
            events.append(event)
        else:
            assert isinstance(event, Progress)


def spoil(task: Task, number: int) -> None:
    """Let the loss of one step be no number."""
    real, calls = task.step, []

    class Broken:
        module = real.module

        def __call__(self, *args):
            calls.append(1)
            sums = real(*args)
            return sums._replace(loss=sums.loss * math.nan) if len(calls) == number else sums

    task.step = Broken()


def equal(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(
        mx.array_equal(one[path], two[path]).item() for path in one
    )


@on_mlx
def test_a_run_yields_an_event_for_every_step_and_the_loss_falls():
    task, state = run(replace(CONFIG, iters=40, epochs=None))
    events, reason = finish(task, state)
    assert reason == "" and [event.step for event in events] == list(range(41))
    assert math.isnan(events[0].loss) and events[0].val_loss == pytest.approx(math.log(97), abs=0.5)
    assert np.mean([e.loss for e in events[-8:]]) < np.mean([e.loss for e in events[1:9]]) - 0.05
    assert [e.step for e in events if e.val_loss is not None] == list(range(0, 41, 4))
    assert all(
        e.tokens <= e.padded and 0 < e.targets < e.tokens and e.grad_norm > 0 for e in events[1:]
    )
    assert events[-1].epoch == pytest.approx(40 / task.feed.per_epoch)
    assert state.history == events


@on_mlx
def test_epochs_replace_iters():
    task, state = run(replace(CONFIG, epochs=1.5, grad_accumulation_steps=2), held=0)
    assert task.feed.per_epoch == 12 and task.iters == 9
    events, _ = finish(task, state)
    assert [e.step for e in events] == list(range(1, 10)) and all(
        e.val_loss is None for e in events
    )


@on_mlx
def test_forty_steps_equal_twenty_a_lost_process_and_twenty_more(tmp_path):
    config = replace(
        CONFIG,
        iters=40,
        steps_per_save=20,
        lr_schedule="cosine",
        warmup=3,
        grad_accumulation_steps=2,
    )
    task, state = run(config, tmp_path / "whole")
    whole, _ = finish(task, state)
    task, other = run(config, tmp_path / "cut")
    work = train_steps(task, other)
    while other.step < 23:
        next(work)
    # the process is gone: nothing of it but its files is used
    found = checkpoint.latest(tmp_path / "cut")
    assert found.name == "step-000020"
    task, resumed = run(config, tmp_path / "cut", resume=found)
    assert resumed.step == 20 and len(resumed.history) == 21
    events, _ = finish(task, resumed)
    assert [e.step for e in events] == list(range(21, 41))
    assert equal(resumed.parameters, state.parameters) and equal(resumed.optimizer, state.optimizer)
    assert [e.loss for e in whole[21:]] == [e.loss for e in events]
    assert [e.val_loss for e in whole[21:]] == [e.val_loss for e in events]
    work.close()


@on_mlx
def test_a_stopped_run_leaves_a_checkpoint_and_goes_on_in_the_same_process(tmp_path):
    task, state = run(CONFIG, tmp_path)
    work = train_steps(task, state)
    while state.step < 7:
        next(work)
    work.close()
    assert checkpoint.latest(tmp_path).name == "step-000007"
    events, _ = finish(task, state)
    assert [e.step for e in events] == list(range(8, 13))
    other, fresh_state = run(CONFIG, tmp_path / "b")
    finish(other, fresh_state)
    assert equal(state.parameters, fresh_state.parameters)


@on_mlx
@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_a_step_that_is_no_number_is_not_taken_over_and_names_its_rows(policy):
    task, state = run(replace(CONFIG, on_nonfinite=policy, steps_per_eval=100))
    spoil(task, 4)
    work = train_steps(task, state)
    while state.step < 3:
        next(work)
    before = dict(state.parameters)
    event = next(work)
    assert event.step == 4 and math.isnan(event.loss) and event.marks[0].kind == "skipped"
    assert "step 4 left out: its loss is not finite (rows " in event.marks[0].text
    assert equal(state.parameters, before)
    if policy == "stop":
        with pytest.raises(StopIteration) as end:
            next(work)
        assert end.value.value.startswith("Stopped at step 4")
    else:
        assert math.isfinite(next(work).loss) and not equal(state.parameters, before)
    work.close()


@on_mlx
def test_a_run_whose_steps_are_never_numbers_ends_with_its_adapter_as_it_was():
    task, state = run(replace(CONFIG, learning_rate=1e30, max_grad_norm=0.0))
    before = dict(state.parameters)
    events, reason = finish(task, state)
    assert "5 steps in a row" in reason and len(events) < 12
    assert (
        all(mx.isfinite(a).all().item() for a in state.parameters.values())
        and before.keys() == state.parameters.keys()
    )


@on_mlx
def test_it_stops_early_and_keeps_the_best(tmp_path):
    task, state = run(
        replace(CONFIG, iters=60, steps_per_eval=2, early_stop=3, learning_rate=0.3), tmp_path
    )
    events, reason = finish(task, state)
    assert reason.startswith("Stopped early") and events[-1].step < 60
    assert events[-1].marks[-1].kind == "early_stop"
    best = min((e.val_loss, e.step) for e in events if e.val_loss is not None and e.step)
    assert (
        checkpoint.best(tmp_path).name == f"best-{best[1]:06d}" and state.best_val_loss == best[0]
    )


@on_mlx
def test_the_memory_guard_ends_a_run_with_its_weights_saved(tmp_path):
    before = mx.set_memory_limit(10**10)
    mx.set_memory_limit(before)
    task, state = run(CONFIG, tmp_path, limit=1)
    events, reason = finish(task, state)
    assert len(events) == 2 and "memory guard" in reason and "is the limit" in reason
    assert checkpoint.latest(tmp_path).name == "step-000001"
    assert mx.set_memory_limit(before) == before  # what was set before is set again


@on_mlx
def test_a_new_learning_rate_counts_from_the_next_step_and_survives_a_resume(tmp_path):
    task, state = run(replace(CONFIG, steps_per_save=4), tmp_path)
    work = train_steps(task, state)
    while state.step < 2:
        next(work)
    task.wanted_rate = 1e-5
    event = next(work)
    assert event.learning_rate == 1e-5 and event.marks[0].kind == "learning_rate"
    while state.step < 4:
        next(work)
    work.close()
    _, again = run(CONFIG, tmp_path, resume=checkpoint.latest(tmp_path))
    assert again.learning_rate == 1e-5


@on_mlx
def test_a_disk_that_is_full_does_not_end_a_run_and_the_last_checkpoint_opens(
    tmp_path, monkeypatch
):
    task, state = run(replace(CONFIG, steps_per_save=2), tmp_path)
    work = train_steps(task, state)
    while state.step < 3:
        next(work)

    def full(path, arrays):
        path.mkdir(exist_ok=True)
        (path / "adapters.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(task.checkpoints, "_write_adapter", full)
    event = next(event for event in work if isinstance(event, StepEvent) and event.step == 4)
    assert any("not written" in mark.text and "No space left" in mark.text for mark in event.marks)
    found = checkpoint.latest(tmp_path)
    assert found.name == "step-000002" and checkpoint.load(found, {}).step == 2
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    work.close()


@on_mlx
def test_a_broken_checkpoint_is_passed_over_for_an_older_one(tmp_path):
    task, state = run(replace(CONFIG, steps_per_save=3), tmp_path)
    finish(task, state)
    names = sorted(path.name for path in tmp_path.glob("step-*"))
    assert names == ["step-000009", "step-000012"]
    file = tmp_path / "step-000012" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert checkpoint.latest(tmp_path).name == "step-000009"
    (tmp_path / "step-000009" / "state.json").write_text("{")
    with pytest.raises(LoadError, match="no checkpoint that opens .2 are broken"):
        checkpoint.latest(tmp_path)


@on_mlx
def test_a_checkpoint_holds_the_optimizers_state_of_every_parameter_by_its_path(tmp_path):
    task, state = run(replace(CONFIG, iters=2), tmp_path)
    finish(task, state)
    found = mx.load(str(tmp_path / "step-000002" / "optimizer.safetensors"))
    assert found.keys() == {
        "step",
        "learning_rate",
        *(f"{path}.{name}" for path in state.parameters for name in "mv"),
    }
    assert all(found[f"{path}.m"].shape == array.shape for path, array in state.parameters.items())


@on_mlx
def test_a_checkpoint_is_an_adapter_folder_of_mlx_lm(tmp_path):
    task, state = run(
        replace(CONFIG, iters=2),
        tmp_path,
        LoRAConfig(rank=4, num_layers=2, keys=("q_proj", "down_proj")),
    )
    finish(task, state)
    facts = json.loads((tmp_path / "step-000002" / "adapter_config.json").read_text())
    assert facts["fine_tune_type"] == "lora" and facts["num_layers"] == 2
    assert sorted(facts["lora_parameters"]["keys"]) == ["mlp.down_proj", "self_attn.q_proj"]
    assert equal(checkpoint.read_parameters(tmp_path / "step-000002"), state.parameters)


@on_mlx
def test_validation_is_the_mean_over_targets_of_a_plain_forward_pass():
    task, state = run(replace(CONFIG, iters=3))
    events, _ = finish(task, state)
    module = task.step.module
    module.eval()
    total = count = 0.0
    for batch in task.held_out:
        logits = module(mx.array(batch.tokens[:, :-1]))
        nats = (
            mx.logsumexp(logits, -1)
            - mx.take_along_axis(logits, mx.array(batch.tokens[:, 1:, None]), -1)[..., 0]
        )
        total += (nats * mx.array(batch.mask[:, 1:])).sum().item()
        count += batch.targets
    assert events[-1].val_loss == pytest.approx(total / count, rel=1e-5)
