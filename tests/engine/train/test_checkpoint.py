"""Checkpoints beside what is the user's: only what the run has made is removed or opened."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from qlab.engine.train import checkpoint
from qlab.engine.train.checkpoint import Checkpoints, TrainState, folders_of
from qlab.errors import LoadError, SaveError
from tests.tiny import on_mlx

THE_USERS = [
    "step-000004-good",
    "step-4",
    "step-by-step",
    "step-000002.bak",
    "best-of-all",
    "best-zzz",
    "best-000001 (copy)",
    "xstep-000001",
]


def write_adapter(folder: Path, parameters: dict[str, mx.array]) -> None:
    mx.save_safetensors(str(folder / "adapters.safetensors"), parameters)


def state(step: int) -> TrainState:
    return TrainState(parameters={"a": mx.ones(2)}, optimizer={}, learning_rate=1e-3, step=step)


def write_checkpoint(folder: Path) -> None:
    folder.mkdir(parents=True)
    write_adapter(folder, {"a": mx.ones(2)})
    (folder / "notes.txt").write_text("keep me")


@on_mlx
def test_what_is_the_users_stays_beside_checkpoints(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    write_checkpoint(elsewhere)
    folder = tmp_path / "run"
    for name in THE_USERS:
        write_checkpoint(folder / name)
    (folder / "step-000000").symlink_to(elsewhere)
    (folder / "step-000009").mkdir()  # no checkpoint, though its name is one
    (folder / "step-000009" / "notes.txt").write_text("keep me")
    (folder / "step-000003").write_text("a file")
    checkpoints = Checkpoints(folder, write_adapter)
    for step in (1, 2, 4, 5):
        checkpoints.save(state(step))
        checkpoints.save_best(state(step))
    for name in (*THE_USERS, "step-000009", "step-000000"):
        assert (folder / name / "notes.txt").read_text() == "keep me"
    assert (folder / "step-000003").read_text() == "a file"
    assert [path.name for path in folders_of(folder, "best")] == ["best-000005"]
    steps = [path.name for path in folders_of(folder, "step")]
    assert steps == ["step-000004", "step-000005", "step-000009"]
    with pytest.raises(SaveError, match="holds other files too .notes.txt."):
        checkpoints.save(state(9))
    assert (folder / "step-000009" / "notes.txt").read_text() == "keep me"
    checkpoints.save(state(5))  # as a resumed run does
    assert not (folder / "step-000001").exists()


@pytest.mark.parametrize("name", ["best-of-all", "best-zzz", "best-"])
def test_a_name_that_is_no_best_adapters_is_not_taken_for_one(tmp_path, name):
    write_checkpoint(tmp_path / name)
    with pytest.raises(LoadError, match="holds no best adapter"):
        checkpoint.best(tmp_path)


@on_mlx
def test_after_a_million_steps_the_last_checkpoint_is_still_the_newest(tmp_path):
    checkpoints = Checkpoints(tmp_path, write_adapter)
    for step in (999_998, 999_999, 1_000_000):
        checkpoints.save(state(step))
    assert [checkpoint.step_of(path) for path in folders_of(tmp_path, "step")] == [
        999_999,
        1_000_000,
    ]
