"""``Trainer``: train an adapter in this kernel, watch it, steer it. Wiring only.

Adapter + rows → session → panel.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, ref

from qlab.core.config.code import train_code
from qlab.core.config.lora import LoRAConfig
from qlab.core.config.train import TrainConfig
from qlab.core.evaluate.judge import JudgeReport
from qlab.core.memory.estimate import MemoryEstimate
from qlab.core.panels.trainer import RunState
from qlab.core.train.events import StepEvent, Voice
from qlab.core.train.report import RunReport, seconds_left
from qlab.core.train.rows import Rows
from qlab.deprecated import deprecated_name
from qlab.engine.data.batches import Feed
from qlab.engine.data.preview import report
from qlab.engine.data.tokenize import read
from qlab.engine.evaluate.generate import checked_prompts
from qlab.engine.train import checkpoint, run_folder
from qlab.engine.train import setup as prepare
from qlab.engine.train.session import Made, Session
from qlab.errors import BusyError, ConfigError, reject_unknown_arguments, reject_unknown_attributes
from qlab.lab.adapter import Adapter
from qlab.lab.estimation import estimate, with_largest_window
from qlab.lab.judging import judged
from qlab.lab.model import Model
from qlab.lab.resume import rebuilt
from qlab.lab.run_setup import keep, ready, to_yaml
from qlab.runtime.atomic import write_page
from qlab.runtime.job import mlx_call
from qlab.views.cards.data import DataView
from qlab.views.cards.runs import Runs
from qlab.views.shared.wire import bundle
from qlab.views.trainer.static import html, page, text_line
from qlab.views.trainer.widget import TrainerPanel

_ACTIVE: WeakKeyDictionary[Model, str] = (
    WeakKeyDictionary()
)  # bases that a run holds, and the run's name
_RUNS: dict[Path, Any] = {}  # this kernel's, by folder: how they ended, or who makes them


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
class Trainer:
    """A training run. As the last line of a cell it is a panel.

    Args:
        adapter: what to train; its base is frozen.
        data: rows: ``text``, ``prompt`` and ``completion``, or ``messages``; a list, a ``datasets``
            set, or a path.
        config: None is ``TrainConfig()``.
        val: rows to judge by, or how many to hold out (a share below 1); None is 5 % (none of fewer
            than 20 rows), 0 none.
        path: folder for checkpoints; None is ``runs/<model>-<time>``. Where a run lies already, a
            number is added.
        prompts: asked at every validation, so that the model's voice can be heard to change.
        callbacks: called with every ``StepEvent``, on the MLX thread; one that fails is told and
            called no more.

    Raises:
        DataError: rows cannot be used; names each of them.
        ConfigError: a setting is not legal, or does not fit the model.
    """

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
        _found: Path | None = None,
    ) -> None:
        if not isinstance(adapter, Adapter):
            raise ConfigError(f"adapter={adapter!r} is not legal; give a qlab.Adapter.")
        if config is not None and not isinstance(config, TrainConfig):
            raise ConfigError(f"config={config!r} is not legal; give a qlab.TrainConfig.")
        config = config or TrainConfig()
        self.adapter = adapter
        model = adapter.model
        self.prompts = checked_prompts(model.tokenizer, prompts, model.spec.vocabulary)
        rows = self._read(data, config)
        if val is None or isinstance(val, (int, float)):
            self.rows, self.held = prepare.held_out(rows, val, config.seed)
        else:
            self.rows = rows
            self.held = self._read(val, config)
        self.path = (
            _found.parent
            if _found
            else run_folder.free(path)
            if path
            else run_folder.named(model.name)
        )
        self._feed = Feed(self.rows, config)
        self._session = Session(self.path.name, config, self._feed, callbacks, self._show)
        # two locks: whoever starts waits for the MLX thread, which must never wait for it to show
        self._lock = threading.RLock()
        self._starting = threading.Lock()
        self._checkpoint = _found
        self._base = None
        self._panel = None
        self._predicted: tuple[Any, MemoryEstimate] | None = None  # of which storage and adapter
        self._voices: tuple[Voice, ...] = ()
        self._error = ""
        self._ack = None
        self._unlearned = f"{self.path.name}, step 0"

    def _read(self, data: Any, config: TrainConfig) -> Rows:
        return read(data, self.adapter.model.tokenizer, config, self.adapter.model.spec.vocabulary)

    # --- the run ----------------------------------------------------------------------------------

    def start(self) -> Trainer:
        """Train in the background, from where the run stands; returns at once.

        Raises:
            BusyError: it runs already, all steps are done, or another run trains on the same base.
        """
        with self._starting:
            self._session.check_idle()
            adapter = self.adapter
            name = self.path.name
            base = adapter.base
            lora = adapter.config
            parameters = adapter.parameters
            if base in _ACTIVE:
                raise BusyError(
                    f"The run {_ACTIVE[base]!r} trains on this model; stop it first, or load the model again."
                )
            _ = self.estimate
            if not adapter.trained:  # from here on no slider moves the base that is trained on
                adapter.set_parameters(parameters, self._unlearned)
            _ACTIVE[base] = name
            adapter.run = name
            self._base = base
            self._error = ""
            _RUNS[self.path] = ref(self)
            self._session.start(lambda: self._make(base, lora, parameters), self._ended)
        self._show()
        return self

    def run(self) -> RunReport:
        """Train and wait for the end; a kernel interrupt stops the run cleanly.

        Raises:
            BusyError: see ``start``.
            Exception: whatever the run failed with; what it had learned is kept.
        """
        self.start()
        return self.wait()

    def wait(self) -> RunReport:
        """Wait for the end of a run that was started."""
        return self._session.wait() or self.report

    def pause(self) -> None:
        """Hold after the present step; ``resume`` goes on."""
        self._session.pause()
        self._show()

    @_accept_old_class_call
    def resume(self) -> None:
        """Go on after a pause."""
        self._session.resume()
        self._show()

    def stop(self) -> None:
        """End after the present step, with a checkpoint; ``start`` goes on from there."""
        self._session.stop()
        self._show()

    config = property(
        lambda self: self._session.config, doc="The run, a ``TrainConfig``; its repr pastes back."
    )

    status = property(
        lambda self: self._session.status,
        doc="``idle``, ``running``, ``paused``, ``stopped``, ``done``, ``failed``.",
    )

    @property
    def learning_rate(self) -> float:
        """Base rate, before warm-up and schedule; a new one counts from the next step on."""
        return self._session.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        self._session.learning_rate = value
        self._show()

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
        found, adapter, facts, rows, held = rebuilt(path, adapter)
        return cls(
            adapter,
            rows,
            facts.train,
            val=held or 0,
            _found=found,
            **{"prompts": facts.prompts, **settings},
        )

    # --- what comes of it -------------------------------------------------------------------------

    @property
    def data(self) -> DataView:
        """What is trained on, token by token: targets, masked, cut.

        Lengths, padding, duplicates, dropped rows.
        """
        return DataView(report(self._feed, self.adapter.model.tokenizer, self.held))

    @property
    def events(self) -> tuple[StepEvent, ...]:
        """Every event so far."""
        return self._session.events

    @property
    def history(self) -> Any:
        """Every step as a data frame."""
        import pandas as pd

        return pd.DataFrame([event.record() for event in self.events])

    @property
    def report(self) -> RunReport:
        """The run so far."""
        session = self._session
        lora = self.adapter.config
        model = self.adapter.model
        plan = self._base.plan if self._base is not None else self.adapter.plan
        stored = plan.default.label if plan else model.spec.storage_label
        return RunReport(
            name=self.path.name,
            model=model.name,
            storage=stored,
            adapter=f"{lora.kind} r{lora.rank}",
            status=self.status,
            iters=self._feed.iters,
            predicted_nbytes=self._predicted[1].total_nbytes if self._predicted else 0,
            path=str(self.path),
            notes=tuple(note for note in (session.reason, *session.notes) if note),
            **session.summary.fields(),
        )

    @property
    def estimate(self) -> MemoryEstimate:
        """Memory that a step with the largest batch will take, foreseen by formula or measured by
        ``probe``.
        """
        adapter = self.adapter
        of = (self.adapter.plan, self.adapter.config)
        if self._predicted is None or self._predicted[0] != of:
            self._predicted = (
                of,
                self._foreseen(
                    adapter if adapter.model.plan is None and adapter.plan else adapter.model
                ),
            )
        return self._predicted[1]

    def probe(self) -> MemoryEstimate:
        """Run one step with the largest batch, take nothing over, and return the memory that it
        took; blocks.

        Raises:
            BusyError: the run is under way.
        """
        self._check_still()
        self._predicted = (
            (self.adapter.plan, self.adapter.config),
            self._foreseen(self.adapter.base, "measured"),
        )
        return self._predicted[1]

    def generate(self, prompt: str, max_tokens: int = 64) -> str:
        """Return the model's answer as it is now; between two steps if the run is under way."""
        mlx_call(self._hand_over)
        text = self._hear(prompt, max_tokens)
        self._show()
        return text

    def evaluate(
        self, rows: Any = None, golden: Iterable[Any] = (), **settings: Any
    ) -> JudgeReport:
        """Judge the adapter as it is now beside its base and the unquantized model; blocks.

        Args:
            rows: not trained on; None takes those held out.
            golden: dicts with ``prompt`` and ``expected``.
            settings: ``match``, ``max_tokens`` and ``keep``, see ``qlab.lab.judging.judged``.

        Raises:
            ConfigError, DataError: there is nothing to judge by, or it has faults.
        """
        mlx_call(self._hand_over)
        held = self.held if rows is None else self._read(rows, self.config)
        return judged(self.adapter, held, golden, prompts=self.prompts, **settings)

    def to_yaml(self, data: str | None = None, model: str | None = None) -> str:
        """Return the run as a file for ``python -m qlab.run``, or for stock ``mlx_lm.lora
        --config``.

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
        return to_yaml(self, data, model)

    def load_best(self) -> Adapter:
        """Give the adapter the parameters with the best validation loss; return it.

        Raises:
            BusyError: the run is under way.
            LoadError: there was no validation.
        """
        self._check_still()
        found = checkpoint.best(self.path)
        self.adapter.set_parameters(
            mlx_call(checkpoint.read_parameters, found), f"best of {self.path.name}, {found.name}"
        )
        return self.adapter

    # --- the panel --------------------------------------------------------------------------------

    @property
    def widget(self) -> Any:
        """The live panel."""
        with self._lock:
            if self._panel is None:
                self._panel = TrainerPanel(self.state(), self._on_intent)
            return self._panel.widget

    def state(self) -> RunState:
        """What the panel shows now, as a value."""
        events = self.events
        session = self._session
        limit = session.task.guard.limit_nbytes - session.task.other_nbytes if session.task else 0
        return RunState(
            report=self.report,
            phase=session.phase,
            history=events,
            seconds_left=seconds_left(events, self._feed.iters),
            learning_rate=self.learning_rate,
            limit_nbytes=limit,
            active_nbytes=events[-1].active_nbytes if events else 0,
            voices=self._voices,
            data=prepare.describe(self._feed, self.held),
            error=self._error or session.error,
            code=train_code(self.config),
        )

    def to_html(self, path: str) -> str:
        """Write the run so far as one self-contained file; return its path."""
        return write_page(path, page(self.state()))

    def close(self) -> None:
        """Stop the run and take the panel off the page."""
        self.stop()
        panel = self._panel
        self._panel = None
        if panel is not None:
            panel.close()

    def __repr__(self) -> str:
        return text_line(self.state())

    def _repr_html_(self) -> str:
        return html(self.state())

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None, **_: Any) -> Any:
        state = self.state()
        return bundle(self.widget, text_line(state), html(state))

    def _display_(self) -> Any:  # marimo
        return self.widget

    # --- within -----------------------------------------------------------------------------------

    @property
    def _steps(self) -> int:
        return self._session.state.step if self._session.state is not None else 0

    def _foreseen(self, source: Any, level: str = "formula") -> MemoryEstimate:
        found = with_largest_window(
            estimate(
                source, adapter=self.adapter.config, train=prepare.largest(self.config, self._feed)
            )
        )
        return (
            found
            if level == "formula"
            else estimate(source, None, found.setup.adapter, found.setup.train, level=level)
        )

    def _check_still(self) -> None:
        if self._session.active:
            raise BusyError(f"The run {self.path.name!r} is {self.status}; stop it first.")

    def _make(self, base: Model, lora: LoRAConfig, parameters: Any) -> Made:
        """Make the run ready, at its first start; on the MLX thread."""
        config = replace(self.config, window=self.estimate.setup.train.window)
        given = (
            base,
            lora,
            config,
            self._feed,
            self.held,
            parameters,
            self.path,
            lambda _: self._good(),
        )
        made = ready(*given, found=self._checkpoint)
        if self._checkpoint is None:
            run_folder.check_new(self.path)
            keep(self.path, base, lora, self.config, self.rows, self.held, self.prompts)
        return made

    def _good(self) -> None:
        """Hand the parameters over, and hear the model's voice; on the MLX thread."""
        self._hand_over()
        if self._session.active:
            for prompt in self.prompts:
                if (self._steps, prompt) not in {
                    (voice.step, voice.prompt) for voice in self._voices
                }:
                    self._hear(prompt)

    def _hear(self, prompt: str, max_tokens: int = 64) -> str:
        voice = Voice(self._steps, prompt, self.adapter.generate(prompt, max_tokens))
        with self._lock:  # cells, the panel and the run may ask at once
            self._voices += (voice,)
        return voice.text

    def _hand_over(self) -> None:
        if self._steps:
            self.adapter.set_parameters(
                self._session.state.parameters, f"{self.path.name}, step {self._steps}"
            )

    def _ended(self) -> None:
        _ACTIVE.pop(self._base, None)
        self.adapter.run = ""
        self._session.finish(self.report, self.estimate.exact_nbytes)
        if self.adapter.origin == self._unlearned:
            self.adapter.reset()
        _RUNS[self.path] = self.report, self.events  # nothing that holds a model

    def _show(self) -> None:
        with (
            self._lock
        ):  # called by cells, widgets and the job: an older state must not overtake a newer one
            if self._panel is not None:
                self._panel.show(self.state(), self._ack)

    def _on_intent(self, intent: dict[str, Any]) -> None:
        """Do what the browser asks.

        Called on a widget thread, so what takes time gets a thread of its own.
        """
        self._ack = intent["seq"]
        op = intent["op"]
        if op == "learning_rate":
            self.learning_rate = intent["value"]
        elif op in ("pause", "resume", "stop"):
            getattr(self, op)()
        elif op in ("start", "generate"):
            work = self.start if op == "start" else lambda: self.generate(intent["prompt"])
            threading.Thread(target=self._heard, args=(work,), daemon=True).start()
        self._show()

    def _heard(self, work: Callable[[], Any]) -> None:
        self._error = ""
        try:
            work()
        except Exception as error:  # it would vanish in a thread
            self._error = str(error) or type(error).__name__
            self._show()


def runs() -> Runs:
    """Return this kernel's runs side by side: a table, and their curves."""
    found = [kept() if isinstance(kept, ref) else kept for kept in _RUNS.values()]
    told = [
        (run.report, run.events) if isinstance(run, Trainer) else run
        for run in found
        if run is not None
    ]
    return Runs(tuple(report for report, _ in told), tuple(events for _, events in told))
