"""``python -m qlab.run FILE | FOLDER``.

A run without a notebook, in one process or in several that ``mlx.launch`` starts.

A file, as ``Trainer.to_yaml`` writes it, starts a run; the folder of a run goes on from its last
checkpoint. The first process writes and speaks. What fails before the first step in one process
ends all of them. Wiring only.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO, TypeVar

from qlab import __version__
from qlab.core.memory.estimate import MemoryEstimate
from qlab.core.train.events import StepEvent
from qlab.core.train.report import summary
from qlab.engine.data.batches import Feed
from qlab.engine.train import checkpoint, run_file, run_folder
from qlab.engine.train import setup as prepare
from qlab.engine.train.checkpoint import TrainState
from qlab.engine.train.distributed import Ranks, joined
from qlab.engine.train.loop import Task, train_steps
from qlab.engine.train.run_folder import RunFacts
from qlab.engine.train.session import Made
from qlab.errors import ConfigError, QlabError, RankError
from qlab.lab.adapter import Adapter
from qlab.lab.estimation import estimate, with_largest_window
from qlab.lab.quantizer import Quantizer
from qlab.lab.resume import source_of
from qlab.lab.run_setup import facts_of, ready
from qlab.lab.trainer import Trainer
from qlab.runtime.job import mlx_call
from qlab.views.trainer import words

_EVERY_S = 1.0  # between lines, unless there is something to tell
_GRACE_S = 120  # that a step may take to end once it shall; then nothing is waited for
T = TypeVar("T")


def main(arguments: list[str], out: TextIO = sys.stdout, err: TextIO = sys.stderr) -> int:
    """Train as a file or a folder says.

    Args:
        arguments: one path.
        out: where the first process tells how it goes.
        err: where a process tells what ended it.

    Returns:
        What the process exits with: 0 at the end of the run, 1 after an error, 2 for other
        arguments.
    """
    if len(arguments) != 1 or arguments[0].startswith("-"):
        err.write("usage: [mlx.launch -n N] python -m qlab.run FILE.yaml | FOLDER\n")
        return 2
    try:
        ranks = mlx_call(joined)
        _run(Path(arguments[0]).expanduser(), ranks, _speaker(out if ranks.first else None))
        return 0
    except QlabError as error:
        err.write(f"qlab.run: {error}\n")
        return 1


def _speaker(out: TextIO | None) -> Callable[[str], None]:
    def say(line: str) -> None:
        if out is not None:
            out.write(f"{line}\n")
            out.flush()

    return say


def _run(path: Path, ranks: Ranks, say: Callable[[str], None]) -> None:
    opened = _together(ranks, lambda: _opened(path, ranks.size))
    _together(ranks, lambda: mlx_call(ranks.check_same, opened.identity))
    parameters = mlx_call(ranks.from_first, opened.trainer.adapter.parameters)
    predicted = _together(ranks, lambda: _foreseen(opened, ranks.size))
    window = predicted.setup.train.window
    task, state, notes = _together(
        ranks, lambda: mlx_call(_made, opened, parameters, ranks, window, say)
    )
    report = replace(opened.trainer.report, predicted_nbytes=predicted.total_nbytes)
    head = (
        *words.summary(report)[:3],
        ("data", prepare.describe(opened.feed, opened.trainer.held)),
    )
    each = (
        f"processes: {ranks.size}, {words.memory_text(report)}{' each' if ranks.size > 1 else ''}"
    )
    for line in (*map(": ".join, head), each, *notes):
        say(line)
    try:
        reason = _train(task, state, say)
    except RankError as error:
        if not ranks.first:
            raise
        raise RankError(
            f"{error} What was learned is kept: python -m qlab.run {report.path} goes on."
        ) from None
    report = replace(
        report, status="stopped" if reason else "done", **summary(tuple(state.history))
    )
    for line in (*filter(None, [reason]), *map(": ".join, words.summary(report)[3:])):
        say(line)


@dataclass(frozen=True)
class _Opened:
    """What a process trains, before anything is computed.

    Attributes:
        trainer: adapter, rows, config and folder.
        facts: what the folder says of the run.
        feed: its batches.
        found: checkpoint to go on from, or None.
    """

    trainer: Trainer
    facts: RunFacts
    feed: Feed
    found: Path | None

    @property
    def identity(self) -> dict[str, str]:
        """What must be the same in all processes, by name."""
        held = self.trainer.held
        return {
            "qlab": __version__,
            "mlx": metadata.version("mlx"),
            "mlx-lm": metadata.version("mlx-lm"),
            "the base": self.facts.base,
            "the settings": repr((self.facts.lora, self.facts.train)),
            "the rows": self.trainer.rows.fingerprint,
            "the rows held out": held.fingerprint if held else "",
            "the checkpoint": _digest(self.found) if self.found else "",
        }


def _digest(folder: Path) -> str:
    return " ".join(
        f"{file.name} {sha256(file.read_bytes()).hexdigest()}"
        for file in sorted(folder.glob("*.safetensors"))
    )


def _opened(path: Path, size: int) -> _Opened:
    found = checkpoint.latest(path) if path.is_dir() else None
    trainer = _resumed(found, size) if found else _begun(run_file.read(path), size)
    facts = mlx_call(
        facts_of, trainer.adapter.base, trainer.adapter.config, trainer.config, trainer.prompts
    )
    return _Opened(trainer, facts, Feed(trainer.rows, trainer.config), found)


def _foreseen(opened: _Opened, size: int) -> MemoryEstimate:
    """Return the memory that each process will take."""
    adapter = opened.trainer.adapter
    train = prepare.largest(opened.trainer.config, opened.feed, size)
    return with_largest_window(estimate(adapter.base, adapter=adapter.config, train=train))


def _resumed(found: Path, size: int) -> Trainer:
    """Return a run as its folder says it, at a checkpoint."""
    facts, _, _ = run_folder.read(found.parent)
    prepare.check_shared(facts.train, size)  # before a large model is read
    return Trainer.load(found, _adapter(facts))


def _begun(file: run_file.RunFile, size: int) -> Trainer:
    """Return a new run as a file says it."""
    facts = file.facts
    data = file.data
    val = file.val
    prepare.check_shared(facts.train, size)
    if file.path and (Path(file.path).expanduser() / "run.json").exists():
        raise ConfigError(
            f"path={file.path!r} holds a run: python -m qlab.run {file.path} goes on; or give another path."
        )
    if (Path(data).expanduser() / "rows.npz").is_file():
        if val is not None:
            raise ConfigError(
                f"val={val!r} is not legal with data={data!r}: that run's folder says which rows are held out."
            )
        _, data, val = run_folder.read(Path(data).expanduser())
        val = val or 0
    return Trainer(
        _adapter(facts, file), data, facts.train, val=val, path=file.path, prompts=facts.prompts
    )


def _adapter(facts: RunFacts, file: run_file.RunFile | None = None) -> Adapter:
    source = source_of(facts)
    if isinstance(source, Quantizer) and facts.lora.init == "default":
        source = source.quantize()  # no start that needs the model as it came, so it is given back
    if file and file.start is not None:
        return Adapter.load(file.start, source)
    seed = file.seed if file and file.seed is not None else facts.train.seed
    return Adapter(source, seed=seed, **facts.lora.__dict__)


def _made(
    opened: _Opened, parameters: Any, ranks: Ranks, window: int, say: Callable[[str], None]
) -> Made:
    """Make the run ready; on the MLX thread."""
    trainer = opened.trainer
    facts = opened.facts
    base = opened.trainer.adapter.base
    heard: set[int] = set()

    def listen(state: TrainState) -> None:
        if ranks.first and trainer.prompts and state.step not in heard:
            heard.add(state.step)
            trainer.adapter.set_parameters(state.parameters, f"step {state.step}")
            for prompt in trainer.prompts:
                say(f"{prompt!r} → {trainer.adapter.generate(prompt)!r}")

    config = replace(trainer.config, window=window)
    given = (base, facts.lora, config, opened.feed, trainer.held, parameters, trainer.path, listen)
    made = ready(*given, found=opened.found, ranks=ranks)
    if opened.found is None and ranks.first:
        run_folder.write(trainer.path, facts, trainer.rows, trainer.held)
    return made


def _together(ranks: Ranks, work: Callable[[], T]) -> T:
    """Do what may fail in one process; then it has failed in all, and the first one says why."""
    error = None
    made = None
    try:
        made = work()
    except Exception as caught:
        error = caught
    told = mlx_call(
        ranks.agreed,
        f"rank {ranks.rank}: {str(error) or type(error).__name__}" if error is not None else "",
    )
    if not told:
        return made  # type: ignore
    if error is not None and (ranks.size == 1 or not isinstance(error, QlabError)):
        raise error
    if not ranks.first:
        raise SystemExit(1)
    raise RankError(told)


def _train(task: Task, state: TrainState, say: Callable[[str], None]) -> str:
    """Train to the end; return why it came early, if it did."""
    work = train_steps(task, state)
    told = 0.0

    def following() -> tuple[Any, str]:
        try:
            return next(work), ""
        except StopIteration as end:
            return None, end.value

    with _signals(task):
        while True:
            event, reason = mlx_call(following)
            if event is None:
                return reason
            if isinstance(event, StepEvent) and (
                time.monotonic() - told > _EVERY_S or event.val_loss is not None or event.marks
            ):
                told = time.monotonic()
                say(_line(event, task.iters))


def _line(event: StepEvent, iters: int) -> str:
    parts = [f"step {event.step}/{iters}", f"loss {words.loss_text(event.loss)}"]
    parts += [f"val {words.loss_text(event.val_loss)}"] if event.val_loss is not None else []
    parts += (
        [words.speed_text(event.tokens_per_second), f"{event.peak_nbytes / 1e9:.2f} GB"]
        if event.step
        else []
    )
    return " · ".join([*parts, *(mark.text for mark in event.marks)])


@contextmanager
def _signals(task: Task) -> Iterator[None]:
    """Within, an interrupt ends the run after the present step, in all processes.

    A second one ends this process at once.
    """

    def told(number: int, frame: Any) -> None:
        task.wanted_end = f"Stopped by {signal.Signals(number).name}."
        signal.signal(number, signal.SIG_DFL)
        signal.alarm(_GRACE_S)

    before = {number: signal.signal(number, told) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
