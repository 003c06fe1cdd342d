"""``python -m qlab.run FILE | FOLDER``: a run without a notebook.

It runs in one process, or in several that ``mlx.launch`` starts. A file, as ``Trainer.to_yaml``
writes it, starts a run; the folder of a run goes on from its last checkpoint. The first process
writes and prints. What fails before the first step in one process ends all of them.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO, TypeVar, cast

from qlab import __version__
from qlab.core.memory.estimate import MemoryEstimate
from qlab.core.progress import Progress
from qlab.core.train.events import StepEvent
from qlab.core.train.report import RunReport, summary
from qlab.engine.train import checkpoint, run_file, run_folder
from qlab.engine.train.checkpoint import TrainState
from qlab.engine.train.distributed import Ranks, joined
from qlab.engine.train.inputs import RunInputs
from qlab.engine.train.loop import train_steps
from qlab.engine.train.run_folder import RunFacts
from qlab.engine.train.setup import (
    PreparedRun,
    check_shared,
    describe,
    prepare_run,
    with_largest_batch,
)
from qlab.engine.train.task import Task
from qlab.errors import ConfigError, QlabError, RankError
from qlab.lab.adapter import Adapter
from qlab.lab.estimation import estimate, with_largest_window
from qlab.lab.quantizer import Quantizer
from qlab.lab.resume import source_of
from qlab.lab.run_setup import run_facts
from qlab.lab.trainer import Trainer
from qlab.runtime.job import mlx_call
from qlab.runtime.paths import users_path
from qlab.views.trainer import words

_EVERY_S = 1.0  # between lines, unless there is something to tell
_GRACE_S = 120  # that a step may take to end after a signal; then the process ends without it
T = TypeVar("T")
Say = Callable[[str], None]


def main(arguments: list[str], out: TextIO = sys.stdout, err: TextIO = sys.stderr) -> int:
    """Train as a file or a folder says.

    Example:
        >>> main(["run.yaml"])
        0

    Args:
        arguments: one path.
        out: where the first process prints how the run goes.
        err: where a process prints what ended it.

    Returns:
        Exit status of the process: 0 at the end of the run, 1 after an error, 2 for other
        arguments.
    """
    if len(arguments) != 1 or arguments[0].startswith("-"):
        err.write("usage: [mlx.launch -n N] python -m qlab.run FILE.yaml | FOLDER\n")
        return 2
    try:
        ranks = mlx_call(joined)
        _run(users_path(arguments[0]), ranks, _speaker(out if ranks.first else None))
        return 0
    except QlabError as error:
        err.write(f"qlab.run: {error}\n")
        return 1


def _speaker(out: TextIO | None) -> Say:
    """Return what prints a line; in all processes but the first it prints nothing."""

    def say(line: str) -> None:
        if out is not None:
            out.write(f"{line}\n")
            out.flush()

    return say


def _run(path: Path, ranks: Ranks, say: Say) -> None:
    opened = _together(ranks, lambda: _open(path, ranks))
    _together(ranks, lambda: mlx_call(ranks.check_same, opened.identity))
    parameters = mlx_call(ranks.from_first, opened.trainer.adapter.parameters)
    predicted = _together(ranks, lambda: _predict(opened))
    window = predicted.setup.train.window
    prepared = _together(ranks, lambda: mlx_call(_prepare, opened, parameters, window, say))
    report = replace(opened.trainer.report, predicted_nbytes=predicted.total_nbytes)
    _say_head(opened, report, prepared.notes, say)
    try:
        reason = _train(prepared.task, prepared.state, say)
    except RankError as error:
        if not ranks.first:
            raise
        raise RankError(
            f"{error} What was learned is kept: python -m qlab.run {report.path} goes on."
        ) from None
    status = "stopped" if reason else "done"
    report = replace(report, status=status, **summary(tuple(prepared.state.history)))
    if reason:
        say(reason)
    for name, text in words.summary(report)[3:]:  # the first three are in the head
        say(f"{name}: {text}")


def _say_head(opened: _Opened, report: RunReport, notes: tuple[str, ...], say: Say) -> None:
    """Print what is trained, on what, and what memory it will take."""
    trainer = opened.trainer
    size = opened.ranks.size
    for name, text in words.summary(report)[:3]:
        say(f"{name}: {text}")
    say(f"data: {describe(trainer.feed, trainer.held_out)}")
    each = " each" if size > 1 else ""
    say(f"processes: {size}, {words.memory_text(report)}{each}")
    for note in notes:
        say(note)


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """What a process trains, before anything is computed.

    Attributes:
        trainer: adapter, rows, config and folder.
        facts: what the folder says of the run.
        start_from: checkpoint to go on from, or None.
        ranks: the processes that train together.
    """

    trainer: Trainer
    facts: RunFacts
    start_from: Path | None
    ranks: Ranks

    @property
    def identity(self) -> dict[str, str]:
        """What must be the same in all processes, by name."""
        held_out = self.trainer.held_out
        return {
            "qlab": __version__,
            "mlx": metadata.version("mlx"),
            "mlx-lm": metadata.version("mlx-lm"),
            "the base": self.facts.base,
            "the settings": repr((self.facts.lora, self.facts.train)),
            "the rows": self.trainer.rows.fingerprint,
            "the rows held out": held_out.fingerprint if held_out else "",
            "the checkpoint": _digest(self.start_from) if self.start_from else "",
        }


def _digest(folder: Path) -> str:
    """Return the names and hashes of a checkpoint's arrays."""
    files = sorted(folder.glob("*.safetensors"))
    return " ".join(f"{file.name} {sha256(file.read_bytes()).hexdigest()}" for file in files)


def _open(path: Path, ranks: Ranks) -> _Opened:
    """Load the run of a folder, or make the one that a file describes."""
    start_from = checkpoint.latest(path) if path.is_dir() else None
    if start_from:
        trainer = _load_run(start_from, ranks.size)
    else:
        trainer = _new_run(run_file.read(path), ranks.size)
    adapter = trainer.adapter
    facts = mlx_call(run_facts, adapter.base, adapter.config, trainer.config, trainer.prompts)
    return _Opened(trainer=trainer, facts=facts, start_from=start_from, ranks=ranks)


def _predict(opened: _Opened) -> MemoryEstimate:
    """Return the memory that each process will take."""
    trainer = opened.trainer
    adapter = trainer.adapter
    train = with_largest_batch(trainer.config, trainer.feed, opened.ranks.size)
    return with_largest_window(estimate(adapter.base, adapter=adapter.config, train=train))


def _load_run(start_from: Path, size: int) -> Trainer:
    """Return a run as its folder describes it, at a checkpoint."""
    facts, _, _ = run_folder.read(start_from.parent)
    check_shared(facts.train, size)  # before a large model is read
    return Trainer.load(start_from, _adapter(facts))


def _new_run(file: run_file.RunFile, size: int) -> Trainer:
    """Return a new run as a file describes it."""
    facts = file.facts
    check_shared(facts.train, size)
    if file.path and (users_path(file.path) / "run.json").exists():
        raise ConfigError(
            f"path={file.path!r} holds a run: python -m qlab.run {file.path} goes on; or give "
            "another path."
        )
    data, val = _data_and_val(file)
    return Trainer(
        _adapter(facts, file),
        data,
        facts.train,
        val=val,
        path=file.path,
        prompts=facts.prompts,
    )


def _data_and_val(file: run_file.RunFile) -> tuple[Any, Any]:
    """Return what to train on and what to validate with, as ``Trainer`` takes them."""
    folder = users_path(file.data)
    if not (folder / "rows.npz").is_file():
        return file.data, file.val
    if file.val is not None:
        raise ConfigError(
            f"val={file.val!r} is not legal with data={file.data!r}: that run's folder says which "
            "rows are held out."
        )
    _, rows, held_out = run_folder.read(folder)
    return rows, held_out or 0


def _adapter(facts: RunFacts, file: run_file.RunFile | None = None) -> Adapter:
    """Return the adapter of a run on its base."""
    source = source_of(facts)
    if isinstance(source, Quantizer) and facts.lora.init == "default":
        source = source.quantize()  # no init needs the model as it came, so its memory is freed
    if file and file.start is not None:
        return Adapter.load(file.start, source)
    seed = file.seed if file and file.seed is not None else facts.train.seed
    return Adapter(source, seed=seed, **asdict(facts.lora))


def _prepare(opened: _Opened, parameters: Any, window: int, say: Say) -> PreparedRun:
    """Prepare the run, and write its folder if it is new; on the MLX thread."""
    trainer = opened.trainer
    base = trainer.adapter.base
    inputs = RunInputs(
        module=base.module,
        spec=base.spec,
        source=base.source,
        lora=opened.facts.lora,
        config=replace(trainer.config, window=window),
        feed=trainer.feed,
        held_out=trainer.held_out,
        parameters=parameters,
        folder=trainer.path,
        start_from=opened.start_from,
        ranks=opened.ranks,
    )
    prepared = prepare_run(inputs, _prompt_asker(opened, say))
    if opened.start_from is None and opened.ranks.first:
        run_folder.write(trainer.path, opened.facts, trainer.rows, trainer.held_out)
    return prepared


def _prompt_asker(opened: _Opened, say: Say) -> Callable[[TrainState], None]:
    """Return what prints the model's answers to the prompts, once a step, in the first process."""
    trainer = opened.trainer
    asked_steps: set[int] = set()

    def ask(state: TrainState) -> None:
        if not opened.ranks.first or not trainer.prompts or state.step in asked_steps:
            return
        asked_steps.add(state.step)
        trainer.adapter.set_parameters(state.parameters, f"step {state.step}")
        for prompt in trainer.prompts:
            say(f"{prompt!r} → {trainer.adapter.generate(prompt)!r}")

    return ask


def _together(ranks: Ranks, work: Callable[[], T]) -> T:
    """Do what may fail in one process; if it does, it fails in all, and the first one says why."""
    error = None
    result = None
    try:
        result = work()
    except Exception as caught:
        error = caught
    complaint = ""
    if error is not None:
        complaint = f"rank {ranks.rank}: {str(error) or type(error).__name__}"
    complaint = mlx_call(ranks.agreed, complaint)
    if not complaint:
        return cast(T, result)
    if error is not None and (ranks.size == 1 or not isinstance(error, QlabError)):
        raise error
    if not ranks.first:
        raise SystemExit(1)
    raise RankError(complaint)


def _train(task: Task, state: TrainState, say: Say) -> str:
    """Train to the end; return why it came early, if it did."""
    events = train_steps(task, state)
    last_line = 0.0

    def next_event() -> tuple[StepEvent | Progress | None, str]:
        try:
            return next(events), ""
        except StopIteration as end:
            return None, end.value

    with _end_on_signals(task):
        while True:
            event, reason = mlx_call(next_event)
            if event is None:
                return reason
            if isinstance(event, StepEvent):
                eventful = event.val_loss is not None or event.marks
                if eventful or time.monotonic() - last_line > _EVERY_S:
                    last_line = time.monotonic()
                    say(_line(event, task.iters))


def _line(event: StepEvent, iters: int) -> str:
    """Return a step in one line."""
    parts = [f"step {event.step}/{iters}", f"loss {words.loss_text(event.loss)}"]
    if event.val_loss is not None:
        parts.append(f"val {words.loss_text(event.val_loss)}")
    if event.step:
        parts.append(words.speed_text(event.tokens_per_second))
        parts.append(f"{event.peak_nbytes / 1e9:.2f} GB")
    return " · ".join([*parts, *(mark.text for mark in event.marks)])


@contextmanager
def _end_on_signals(task: Task) -> Iterator[None]:
    """Within, an interrupt ends the run after the present step, in all processes.

    A second one ends this process at once.
    """

    def end_run(number: int, frame: Any) -> None:
        task.wanted_end = f"Stopped by {signal.Signals(number).name}."
        signal.signal(number, signal.SIG_DFL)
        signal.alarm(_GRACE_S)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, end_run) for number in numbers}
    try:
        yield
    finally:
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
