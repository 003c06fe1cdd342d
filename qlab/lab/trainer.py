"""``Trainer``: train an adapter in this kernel, watch it, steer it.

The run itself is a ``TrainingRun``; what is shown is a ``RunState``. This file is the facade that a
notebook sees: it connects the two with the panel.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

from qlab.core.config.code import train_code
from qlab.core.config.train import TrainConfig
from qlab.core.evaluate.judge import JudgeReport
from qlab.core.panels.trainer import RunState
from qlab.core.train.events import StepEvent
from qlab.core.train.report import RunReport, seconds_left
from qlab.deprecated import deprecated_name
from qlab.engine.data.batches import Feed
from qlab.engine.evaluate.generate import checked_prompts
from qlab.engine.evaluate.teacher import KEEP
from qlab.engine.train import run_folder
from qlab.engine.train.session import Session
from qlab.engine.train.setup import describe
from qlab.errors import (
    ConfigError,
    reject_unknown_arguments,
    reject_unknown_attributes,
    reject_unknown_settings,
)
from qlab.lab import run_setup
from qlab.lab.adapter import Adapter
from qlab.lab.evaluation import evaluate_adapter
from qlab.lab.panel import HasPanel, PanelViews
from qlab.lab.resume import stored_run
from qlab.lab.run_results import RunResults
from qlab.lab.training_run import TrainingRun
from qlab.runtime.job import mlx_call
from qlab.views.trainer.static import html, page, text_line
from qlab.views.trainer.widget import TrainerPanel


def _accept_old_class_call(resume: Callable[[Any], None]) -> Callable[[Any], None]:
    """Let ``Trainer.resume(path, …)``, the old spelling of ``Trainer.load``, still work."""

    @wraps(resume)
    def resume_or_load(trainer: Any, *args: Any, **settings: Any) -> Any:
        if isinstance(trainer, Trainer):
            return resume(trainer, *args, **settings)
        deprecated_name("Trainer.resume(path)", "Trainer.load(path)")
        return Trainer.load(trainer, *args, **settings)

    return resume_or_load


@reject_unknown_arguments
@reject_unknown_attributes
class Trainer(HasPanel, RunResults):
    """A training run. As the last line of a cell it is a panel.

    Example:
        >>> a = qlab.Adapter(qlab.Quantizer(qlab.load("demo"), bits=4), rank=8)
        >>> rows = [{"prompt": "Hello", "completion": "Hi there."}] * 40
        >>> t = qlab.Trainer(a, rows, qlab.TrainConfig(iters=50))
        >>> t.start()  # returns at once; t.run() blocks
        >>> t.report.val_loss

    Args:
        adapter: adapter to train; its base is frozen.
        data: rows with ``text``, ``prompt`` and ``completion``, or ``messages``: a list, a
            ``datasets`` set, or a path.
        config: config of the run; None is ``TrainConfig()``.
        val: rows for validation, or how many to hold out (a share below 1); None is 5 % (none of
            fewer than 20 rows), 0 none.
        path: folder for checkpoints; None is ``runs/<model>-<time>``. Where a run lies already, a
            number is added.
        prompts: asked at every validation, to show how the model's answers change.
        callbacks: called with every ``StepEvent``, on the MLX thread; one that fails is noted in
            the report and not called again.

    Attributes:
        adapter: adapter in training.
        rows: token rows that are trained on.
        held_out: token rows for validation, or None.
        feed: batches of the rows, by number.
        prompts: asked at every validation.

    Raises:
        DataError: rows cannot be used; names each of them.
        ConfigError: a setting is not legal, or does not fit the model.
    """

    _views = PanelViews(panel=TrainerPanel, text_line=text_line, html=html, page=page)

    def __init__(
        self,
        adapter: Adapter,
        data: Any,
        config: TrainConfig | None = None,
        *,
        val: Any = None,
        path: str | Path | None = None,
        prompts: Iterable[str] = (),
        callbacks: Iterable[Callable[[StepEvent], Any]] = (),
    ) -> None:
        super().__init__()
        if not isinstance(adapter, Adapter):
            raise ConfigError(f"adapter={adapter!r} is not legal; give a qlab.Adapter.")
        if config is not None and not isinstance(config, TrainConfig):
            raise ConfigError(f"config={config!r} is not legal; give a qlab.TrainConfig.")
        config = config or TrainConfig()
        model = adapter.model
        self.adapter = adapter
        self.prompts = checked_prompts(model.tokenizer, prompts, model.spec.vocabulary)
        self.rows, self.held_out = run_setup.train_and_held_out(data, val, adapter, config)
        self.feed = Feed(self.rows, config)
        folder = run_folder.unused_path(path) if path else run_folder.new_run_path(model.name)
        session = Session(
            name=folder.name,
            config=config,
            feed=self.feed,
            callbacks=callbacks,
            on_change=self._show,
        )
        self._training = TrainingRun(
            adapter=adapter,
            session=session,
            held_out=self.held_out,
            prompts=self.prompts,
            folder=folder,
        )
        self._error = ""

    @classmethod
    def load(cls, path: str | Path, adapter: Adapter | None = None, **settings: Any) -> Trainer:
        """Load a run from its folder; ``start`` or ``run`` goes on from its last checkpoint.

        The rest of the run equals that of an uninterrupted one bit for bit.

        Example:
            >>> qlab.Trainer.load("runs/demo-20261201-101500").run()

        Args:
            path: folder of the run, or of one of its checkpoints; later checkpoints are removed
                when the first new one is written.
            adapter: adapter to train, on the same base; None loads and quantizes the base anew.
            settings: ``prompts`` and ``callbacks`` as for ``Trainer``.

        Raises:
            LoadError: no checkpoint there opens, or the model is gone.
            ConfigError: the base is not the one that the run was made with.
        """
        stored = stored_run(path, adapter)
        settings = {"prompts": stored.facts.prompts, **settings}
        trainer = cls(
            stored.adapter,
            stored.rows,
            stored.facts.train,
            val=stored.held_out or 0,
            path=stored.checkpoint.parent,
            **settings,
        )
        trainer._training.continue_from(stored.checkpoint)
        return trainer

    # --- the run ----------------------------------------------------------------------------------

    def start(self) -> Trainer:
        """Train in the background, from where the run stands; returns at once.

        Raises:
            BusyError: it runs already, all steps are done, or another run trains on the same base.
            ConfigError: it has begun, and the adapter or its base was changed since.
        """
        self._training.start()
        self._show()
        return self

    def run(self) -> RunReport:
        """Train and wait for the end; a kernel interrupt stops the run cleanly.

        Raises:
            BusyError: see ``start``.
            Exception: whatever the run failed with; the adapter keeps its last good state.
        """
        self.start()
        return self.wait()

    def wait(self) -> RunReport:
        """Wait for the end of a run that was started."""
        self._training.session.wait()
        return self.report

    def pause(self) -> None:
        """Pause after the present step; ``resume`` goes on."""
        self._training.session.pause()
        self._show()

    @_accept_old_class_call
    def resume(self) -> None:
        """Go on after a pause."""
        self._training.session.resume()
        self._show()

    def stop(self) -> None:
        """End after the present step, with a checkpoint; ``start`` goes on from there."""
        self._training.session.stop()
        self._show()

    @property
    def learning_rate(self) -> float:
        """Base rate, before warm-up and schedule; a new one counts from the next step on."""
        return self._training.session.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        self._training.session.learning_rate = value
        self._show()

    # --- what comes of it -------------------------------------------------------------------------

    def generate(self, prompt: str, max_tokens: int = 64) -> str:
        """Return the adapter's answer as it is now; between two steps if the run is under way."""
        text = self._training.generate(prompt, max_tokens)
        self._show()
        return text

    @reject_unknown_settings
    def evaluate(
        self,
        rows: Any = None,
        golden: Iterable[Mapping[str, Any]] = (),
        *,
        match: str | Callable[[str, str], float] = "exact",
        max_tokens: int = 64,
        keep: int = KEEP,
    ) -> JudgeReport:
        """Evaluate the adapter as it is now beside its base and the unquantized model; blocks.

        The trainer's prompts are answered too.

        Example:
            >>> golden = [{"prompt": "Which keyword leaves a loop?", "expected": "break"}]
            >>> report = t.evaluate(golden=golden, match="contains")
            >>> report["quantized + adapter"].perplexity

        Args:
            rows: rows that were not trained on; None takes those held out.
            golden: questions with expected answers: dicts with ``prompt`` and ``expected``.
            match: ``exact``, ``contains``, or a function of answer and expected answer that
                returns True, False or a number from 0 to 1.
            max_tokens: tokens of the longest answer.
            keep: number of the unquantized model's predictions cached for each target, the
                likeliest; the whole vocabulary is exact.

        Raises:
            ConfigError: there is nothing to evaluate on, or a setting is unknown or not legal.
            DataError: rows or golden set have faults.
        """
        self._training.update_adapter()
        held_out = self.held_out
        if rows is not None:
            held_out = run_setup.read_rows(rows, self.adapter, self.config)
        return evaluate_adapter(
            self.adapter,
            held_out,
            golden,
            match=match,
            prompts=self.prompts,
            max_tokens=max_tokens,
            keep=keep,
        )

    def to_yaml(self, data: str | None = None, model: str | None = None) -> str:
        """Return the run as a file for ``python -m qlab.run`` or for ``mlx_lm.lora --config``.

        Args:
            data: for mlx-lm: folder with ``train.jsonl`` and ``valid.jsonl``; comments say what
                mlx-lm does otherwise. None is for ``qlab.run``: the rows are written to the run's
                folder.
            model: folder of the base; None is where it was loaded from (for mlx-lm, if it was not
                quantized here).

        Raises:
            ConfigError: mlx-lm cannot do that, or the base has no folder.
            SaveError: the run's folder cannot be written.
        """
        adapter = self.adapter
        if data is not None:
            return run_setup.stock_recipe(
                adapter,
                self.config,
                data=data,
                model=model,
                rows=self.rows.kind,
                iters=self.feed.iters,
            )
        run_setup.check_has_folder(adapter.base, model)
        folder = self.path.resolve()
        start = None
        if adapter.trained and not self.events:  # the run would go on from these parameters
            start = str(folder / "start")
            adapter.save(start)
        facts = mlx_call(self._training.write_folder, adapter.base, adapter.config)
        return run_setup.run_file_text(facts, folder, seed=adapter.seed, start=start, model=model)

    def load_best(self) -> Adapter:
        """Give the adapter the parameters with the best validation loss; return it.

        Raises:
            BusyError: the run is under way, or another one trains the adapter.
            LoadError: there was no validation.
        """
        self._training.load_best()
        return self.adapter

    # --- the panel --------------------------------------------------------------------------------

    def state(self) -> RunState:
        """What the panel shows now, as a value."""
        events = self.events
        session = self._training.session
        limit_nbytes = 0
        if session.task is not None:
            limit_nbytes = session.task.guard.limit_nbytes - session.task.meter.other_nbytes
        return RunState(
            report=self.report,
            phase=session.phase,
            history=events,
            seconds_left=seconds_left(events, self.feed.iters),
            learning_rate=self.learning_rate,
            limit_nbytes=limit_nbytes,
            active_nbytes=events[-1].active_nbytes if events else 0,
            generations=self._training.generations.all,
            data=describe(self.feed, self.held_out),
            error=self._error or session.error,
            code=train_code(self.config),
        )

    def _stop_work(self) -> None:
        self.stop()

    def _do_learning_rate(self, intent: dict[str, Any]) -> None:
        self.learning_rate = intent["value"]

    def _do_pause(self, intent: dict[str, Any]) -> None:
        self.pause()

    def _do_resume(self, intent: dict[str, Any]) -> None:
        self.resume()

    def _do_stop(self, intent: dict[str, Any]) -> None:
        self.stop()

    def _do_start(self, intent: dict[str, Any]) -> None:
        self._in_thread(self.start)

    def _do_generate(self, intent: dict[str, Any]) -> None:
        self._in_thread(lambda: self.generate(intent["prompt"]))

    def _in_thread(self, work: Callable[[], Any]) -> None:
        """Do what takes long outside of the widget thread; show what it raises in the panel."""

        def show_errors() -> None:
            self._error = ""
            try:
                work()
            except Exception as error:  # it would vanish in a thread
                self._error = str(error) or type(error).__name__
                self._show()

        threading.Thread(target=show_errors, daemon=True).start()
