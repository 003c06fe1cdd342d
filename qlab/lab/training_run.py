"""``TrainingRun``: one adapter in training, from its first start to its end.

``Trainer`` owns one. It connects a ``Session`` (the job on the MLX thread) with the adapter: hands
the parameters over, asks the prompts, reserves the base, and writes the folder of the run.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlab.core.config.lora import LoRAConfig
from qlab.core.train.events import StepEvent
from qlab.core.train.report import RunReport
from qlab.core.train.rows import Rows
from qlab.engine.train import checkpoint, run_folder
from qlab.engine.train.checkpoint import TrainState
from qlab.engine.train.inputs import RunInputs
from qlab.engine.train.run_folder import RunFacts
from qlab.engine.train.session import Session
from qlab.engine.train.setup import PreparedRun, prepare_run
from qlab.errors import BusyError, ConfigError
from qlab.lab.adapter import Adapter
from qlab.lab.kernel_runs import claim_base, release_base, remember_ended, remember_started
from qlab.lab.model import Model
from qlab.lab.run_memory import RunMemory
from qlab.lab.run_setup import run_facts
from qlab.lab.sample_generations import SampleGenerations
from qlab.runtime.job import mlx_call


class TrainingRun:
    """A run of one adapter.

    Args:
        adapter: adapter to train.
        session: the job, with the config, the batches and the callbacks.
        held_out: rows for validation, or None.
        prompts: asked at every validation.
        folder: folder of the run.

    Attributes:
        memory: predicted or measured peak memory.
        generations: answers to prompts so far.
    """

    def __init__(
        self,
        *,
        adapter: Adapter,
        session: Session,
        held_out: Rows | None,
        prompts: tuple[str, ...],
        folder: Path,
    ) -> None:
        self.adapter = adapter
        self.session = session
        self.folder = folder
        self.memory = RunMemory(adapter, session.feed)
        self.generations = SampleGenerations(adapter, prompts)
        self._held_out = held_out
        self._prompts = prompts
        # not the panel's lock: ``start`` waits for the MLX thread, which must be able to show
        self._starting = threading.Lock()
        self._start_from: Path | None = None
        self._base: Model | None = None
        self._lora: LoRAConfig | None = None
        self._given = ("", 0)  # origin of the parameters that the adapter got last, and their step

    @property
    def events(self) -> tuple[StepEvent, ...]:
        """Every event so far."""
        return self.session.events

    @property
    def report(self) -> RunReport:
        """The run so far."""
        session = self.session
        adapter = self.adapter
        plan = self._base.plan if self._base is not None else adapter.plan
        label = plan.default.label if plan else adapter.model.spec.storage_label
        return RunReport(
            name=self.folder.name,
            model=adapter.model.name,
            storage=label,
            adapter=f"{adapter.config.kind} r{adapter.config.rank}",
            status=session.status,
            iters=session.feed.iters,
            predicted_nbytes=self.memory.predicted_nbytes,
            path=str(self.folder),
            notes=tuple(note for note in (session.reason, *session.notes) if note),
            **session.summary.fields(),
        )

    def continue_from(self, checkpoint: Path) -> None:
        """Let the first start go on from a checkpoint, and write to its run's folder."""
        self._start_from = checkpoint
        self.folder = checkpoint.parent
        self.session.name = self.folder.name

    def start(self) -> None:
        """Train in the background, from where the run stands.

        Raises:
            BusyError: it runs already, all steps are done, or another run trains on the same base.
            ConfigError: it has begun, and the adapter or its base was changed since.
        """
        with self._starting:
            self.session.check_idle()
            adapter = self.adapter
            base = adapter.base
            lora = adapter.config
            self._check_unchanged(base, lora)
            parameters = adapter.parameters
            claim_base(base, self.folder.name)
            try:
                self.memory.estimate(self.session.config)
                if not adapter.trained:  # from here on no slider moves the base
                    adapter.set_parameters(parameters, self._untrained_origin)
            except BaseException:
                release_base(base)
                raise
            adapter.run = self.folder.name
            self._base = base
            self._lora = lora
            remember_started(self.folder, self)
            self.session.start(lambda: self._prepare(base, lora, parameters), self._on_end)

    def check_not_active(self) -> None:
        """Refuse what cannot be done while the run is under way.

        Raises:
            BusyError: it is running or paused.
        """
        if self.session.active:
            raise BusyError(
                f"The run {self.folder.name!r} is {self.session.status}; stop it first."
            )

    def generate(self, prompt: str, max_tokens: int) -> str:
        """Return the answer to a prompt as the model is now; between two steps of the run."""
        self.update_adapter()
        origin, step = self._given
        holds_them = self.adapter.origin == origin
        return self.generations.ask(prompt, step if holds_them else 0, max_tokens)

    def update_adapter(self) -> None:
        """Give the adapter the present parameters of a run under way.

        The adapter of one that is over is the user's: it may be reset by now, or hold the best.
        """

        def update() -> None:
            if self.session.active:
                self._hand_over()

        mlx_call(update)

    def load_best(self) -> None:
        """Give the adapter the parameters with the best validation loss.

        Raises:
            BusyError: the run is under way, or another one trains the adapter.
            LoadError: there was no validation.
        """
        self.check_not_active()
        self.adapter.check_not_in_training()
        best = checkpoint.best(self.folder)
        parameters = mlx_call(checkpoint.read_parameters, best)
        origin = f"best of {self.folder.name}, {best.name}"
        self._give(parameters, origin, checkpoint.step_of(best))

    def _check_unchanged(self, base: Model, lora: LoRAConfig) -> None:
        """Refuse to go on with another adapter or base than the run has trained on.

        Raises:
            ConfigError: names the first setting that was changed.
        """
        if self.session.task is None or self._base is None or self._lora is None:
            return
        advice = "set it back, or train it in a new Trainer"
        name = self._lora.first_difference(lora)
        if name:
            then = getattr(self._lora, name)
            now = getattr(lora, name)
            raise ConfigError(
                f"The run {self.folder.name!r} trains {name}={then!r}, and the adapter has "
                f"{name}={now!r} now; {advice}."
            )
        if base.plan != self._base.plan:
            raise ConfigError(
                f"The run {self.folder.name!r} trains on {self._base.storage_label}, and the "
                f"adapter's base is stored otherwise now ({base.storage_label}); {advice}."
            )

    # --- on the MLX thread ------------------------------------------------------------------------

    def _hand_over(self) -> None:
        """Give the adapter the run's present parameters. Runs on the MLX thread."""
        state = self.session.state
        if state is not None and state.step:
            self._give(state.parameters, f"{self.folder.name}, step {state.step}", state.step)

    def _give(self, parameters: dict[str, Any], origin: str, step: int) -> None:
        """Give the adapter parameters, and note how many steps are behind them."""
        self.adapter.set_parameters(parameters, origin)
        self._given = (origin, step)

    def write_folder(self, base: Model, lora: LoRAConfig) -> RunFacts:
        """Write the run's settings and rows to its folder; return the settings.

        Runs on the MLX thread.

        Raises:
            SaveError: the folder cannot be written.
        """
        facts = run_facts(base, lora, self.session.config, self._prompts)
        run_folder.write(self.folder, facts, self.session.feed.rows, self._held_out)
        return facts

    def _prepare(self, base: Model, lora: LoRAConfig, parameters: dict[str, Any]) -> PreparedRun:
        """Prepare the run at its first start."""
        config = self.session.config
        window = self.memory.estimate(config).setup.train.window
        inputs = RunInputs(
            module=base.module,
            spec=base.spec,
            source=base.source,
            lora=lora,
            config=replace(config, window=window),
            feed=self.session.feed,
            held_out=self._held_out,
            parameters=parameters,
            folder=self.folder,
            start_from=self._start_from,
        )
        prepared = prepare_run(inputs, self._on_good)
        if self._start_from is None:
            run_folder.check_new(self.folder)
            self.write_folder(base, lora)
        return prepared

    def _on_good(self, state: TrainState) -> None:
        """Hand the parameters over and ask the prompts, after a validation or a checkpoint."""
        self._hand_over()
        if self.session.active:
            self.generations.ask_all(self.session.step)

    def _on_end(self) -> None:
        if self._base is not None:
            release_base(self._base)
        self.adapter.run = ""
        exact_nbytes = self.memory.estimate(self.session.config).exact_nbytes
        self.session.finish(self.report, exact_nbytes)
        if self.adapter.origin == self._untrained_origin:
            self.adapter.reset()
        remember_ended(self.folder, self)

    @property
    def _untrained_origin(self) -> str:
        return f"{self.folder.name}, step 0"
