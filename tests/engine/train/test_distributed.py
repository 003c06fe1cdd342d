"""Several processes train as one: the same losses, the same decisions, and an error where one is lost. Three on a ring."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import qlab  # noqa: F401

import mlx.core as mx
import numpy as np
import pytest

from qlab.core.config.lora import LoRAConfig
from qlab.core.config.train import TrainConfig
from qlab.engine.train import checkpoint
from qlab.engine.train import distributed as parallel
from qlab.engine.data.batches import Feed
from qlab.engine.data.batches import part
from qlab.runtime.job import mlx_call
from qlab.engine.step.protocol import LossAndGradients
from qlab.engine.train.distributed import ALONE
from qlab.engine.train.setup import check_shared
from qlab.engine.train.loop import train_steps
from qlab.engine.train.validate import Nats
from qlab.errors import ConfigError
from qlab.errors import RankError
from tests.engine.train.test_loop import CONFIG, finish, rows, run, spoil
from tests.ring import launch
from tests.tiny import on_mlx

SIZE = 3
LORA = LoRAConfig(rank=4)
WHOLE = replace(
    CONFIG, iters=6, batch_size=6, grad_accumulation_steps=2, steps_per_eval=3, steps_per_save=100
)
RUNS = {
    "whole": WHOLE,
    "stepped and packed": replace(WHOLE, grad_checkpoint=True, pack=True, loss_chunk=16),
}


def curves(state, reason: str) -> dict:
    return {
        "loss": [event.loss for event in state.history[1:]],
        "grad_norm": [event.grad_norm for event in state.history[1:]],
        "val": [event.val_loss for event in state.history],
        "counts": [(event.targets, event.tokens, event.padded) for event in state.history],
        "marks": [mark.kind for event in state.history for mark in event.marks],
        "reason": reason,
    }


def train(
    config: TrainConfig, ranks=ALONE, folder=None, change=None, **settings
) -> tuple[dict, dict]:
    task, state = run(config, folder, LORA, ranks=ranks, **settings)
    if change:
        change(task)
    _, reason = finish(task, state)
    return curves(state, reason), {
        path: np.array(array) for path, array in state.parameters.items()
    }


def count_rows(task, found: list) -> None:
    real = task.step

    class Counted:
        module = real.module

        def __call__(self, parameters, batch):
            found.append(batch.tokens.shape[0])
            return real(parameters, batch)

    task.step = Counted()


def one_process(folder: Path) -> None:
    """What each of the processes does; its findings are written to a file of its own."""
    ranks = parallel.joined()
    mine, found, arrays = ranks.rank == 1, {}, {}
    found["gathered"] = ranks.gather(f"process {ranks.rank} ü")
    found["agreed"] = [ranks.agreed(""), ranks.agreed("one" if mine else "")]
    found["nats"] = ranks.all_nats(Nats(0.1 * ranks.rank, ranks.rank)).__dict__
    sums = LossAndGradients(
        mx.array(1.0),
        {"a": mx.full((2, 3), ranks.rank + 1, mx.bfloat16), "b": mx.ones(5)},
        mx.array(2.0),
    )
    total = ranks.total(sums)
    found["total"] = [
        total.loss.item(),
        total.grads["a"].tolist(),
        total.grads["b"].sum().item(),
        total.count.item(),
    ]
    found["dtype"] = str(total.grads["a"].dtype)
    found["first"] = ranks.from_first({"x": mx.arange(3.0) + ranks.rank})["x"].tolist()
    ranks.check_same({"model": "m", "rows": "r"})
    try:
        ranks.check_same({"model": "m", "rows": "other" if mine else "r"})
    except RankError as error:
        found["differ"] = str(error)
    for name, config in RUNS.items():
        kept, counted = folder / f"run-{ranks.rank}" if name == "whole" else None, []
        found[name], parameters = train(
            config, ranks, kept, lambda task, counted=counted: count_rows(task, counted)
        )
        found[name]["rows"] = counted
        arrays |= {f"{name}:{path}": array for path, array in parameters.items()}
    found["skipped"], _ = train(WHOLE, ranks, change=partial(spoil, number=3) if mine else None)
    found["guarded"], _ = train(WHOLE, ranks, limit=1 if mine else None)
    found["ended"], _ = train(
        WHOLE, ranks, change=(lambda task: setattr(task, "wanted_end", "enough")) if mine else None
    )
    (folder / f"{ranks.rank}.json").write_text(json.dumps(found))
    np.savez(folder / f"{ranks.rank}.npz", **arrays)


def lose_one(folder: Path) -> None:
    """Train until process 1 is killed."""
    ranks = parallel.joined()
    task, state = run(replace(WHOLE, iters=50), folder if ranks.first else None, LORA, ranks=ranks)
    for _ in train_steps(task, state):
        if state.step == 2 and ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    for code, _, errors in launch(
        [["-m", "tests.engine.train.test_distributed", "one_process", folder]] * SIZE, folder
    ):
        assert code == 0, errors
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(SIZE)]


def test_texts_sums_and_arrays_reach_all(three):
    for rank, found in enumerate(three[1]):
        assert found["gathered"] == [f"process {n} ü" for n in range(SIZE)], rank
        assert found["agreed"] == ["", "one"]
        assert found["nats"] == {"total": 0.1 + 0.2, "count": 3}
        assert (
            found["total"] == [3.0, [[6.0] * 3] * 2, 15.0, 6.0]
            and found["dtype"] == "mlx.core.bfloat16"
        )
        assert found["first"] == [0.0, 1.0, 2.0]
        assert "rows (rank 1)" in found["differ"] and "model" not in found["differ"]


@pytest.mark.parametrize("name", RUNS)
def test_several_processes_make_the_steps_of_one(three, name):
    folder, found = three
    alone, parameters = mlx_call(train, RUNS[name])
    stored = [np.load(folder / f"{rank}.npz") for rank in range(SIZE)]
    for own in found:
        for curve in ("loss", "grad_norm", "val"):
            wanted = [math.nan if x is None else x for x in alone[curve]]
            assert [math.nan if x is None else x for x in own[name][curve]] == pytest.approx(
                wanted, rel=2e-5, nan_ok=True
            )
        assert (
            own[name]["counts"] == [list(counts) for counts in alone["counts"]]
            and own[name]["reason"] == ""
        )
    task, _ = mlx_call(run, RUNS[name], lora=LORA)
    whole = [
        len(task.feed.batch(number).numbers)
        for number in range(WHOLE.iters * WHOLE.grad_accumulation_steps)
    ]
    assert sum(sum(own[name]["rows"]) for own in found) == sum(whole)
    assert max(max(own[name]["rows"]) for own in found) == math.ceil(max(whole) / SIZE)
    for path, array in parameters.items():
        first = stored[0][f"{name}:{path}"]
        np.testing.assert_allclose(first, array, atol=2e-4)
        assert all(np.array_equal(first, other[f"{name}:{path}"]) for other in stored[1:]), path


def test_only_the_first_writes_and_its_checkpoint_opens(three):
    folder, _ = three
    assert sorted(path.name for path in folder.glob("run-*")) == ["run-0"]
    assert mlx_call(checkpoint.load, checkpoint.latest(folder / "run-0"), {}).step == WHOLE.iters


def test_what_one_finds_all_act_upon(three):
    for own in three[1]:
        assert (
            own["skipped"]["marks"].count("skipped") == 1
            and len(own["skipped"]["loss"]) == WHOLE.iters
        )
        assert [math.isnan(loss) for loss in own["skipped"]["loss"]] == [False, True] + [False] * 4
        assert len(own["guarded"]["loss"]) == 1 and own["guarded"]["marks"][-1] == "guard"
        assert own["guarded"]["reason"].startswith("The memory guard ended the run: MLX holds")
        assert len(own["ended"]["loss"]) == 1 and own["ended"]["reason"] == "enough"
        assert own["guarded"]["reason"] == three[1][0]["guarded"]["reason"]


def test_where_one_is_killed_the_others_say_so_and_what_was_learned_is_kept(tmp_path):
    ended = launch(
        [["-m", "tests.engine.train.test_distributed", "lose_one", tmp_path]] * 2, tmp_path
    )
    assert ended[1][0] == -signal.SIGKILL
    assert ended[0][0] == 1 and "RankError: Rank 0 of 2 lost another process" in ended[0][2]
    assert checkpoint.latest(tmp_path).name == "step-000002"


@pytest.mark.parametrize("pack", [False, True])
def test_parts_of_a_batch_are_all_of_its_rows(pack):
    config = TrainConfig(batch_size=5, max_seq_length=24, pack=pack)
    feed = Feed(rows(23), config)
    for number in range(feed.per_epoch):
        batch = feed.batch(number)
        parts = [part(batch, rank, 3) for rank in range(3)]
        assert sorted(n for own in parts for n in own.numbers) == sorted(batch.numbers)
        assert sum(own.targets for own in parts) == batch.targets
        assert all(
            own.tokens.shape[1] == batch.tokens.shape[1] and (own.segments is None) != pack
            for own in parts
        )


@on_mlx
def test_one_process_sends_nothing_and_changes_no_object(monkeypatch):
    monkeypatch.setattr(mx.distributed, "all_sum", None)
    assert parallel.joined() is ALONE and ALONE.first
    batch, key = Feed(rows(4), CONFIG).batch(0), mx.random.key(1)
    sums = LossAndGradients(mx.array(1.0), {}, mx.array(1.0))
    assert ALONE.share(batch) is batch and ALONE.key(key) is key and ALONE.total(sums) is sums
    assert (
        ALONE.gather("x") == ["x"]
        and ALONE.agreed("") == ""
        and ALONE.from_first(sums.grads) is sums.grads
    )
    ALONE.check_same({"model": "m"})


@on_mlx
def test_processes_that_cannot_be_joined_are_refused(monkeypatch):
    monkeypatch.setenv("MLX_WORLD_SIZE", "4")
    with pytest.raises(RankError, match="4 processes were launched.*--backend ring"):
        parallel.joined()


@pytest.mark.parametrize(
    ("batch", "size", "near"), [(5, 2, "4 or 6"), (3, 4, "the nearest is 4"), (10, 4, "8 or 12")]
)
def test_a_batch_that_cannot_be_shared_evenly_is_refused_with_the_nearest(batch, size, near):
    with pytest.raises(ConfigError, match=f"batch_size={batch} .*{size} processes.*{near}"):
        check_shared(TrainConfig(batch_size=batch), size)
    check_shared(TrainConfig(batch_size=size * 2), size)


if __name__ == "__main__":
    mlx_call({"one_process": one_process, "lose_one": lose_one}[sys.argv[1]], Path(sys.argv[2]))
