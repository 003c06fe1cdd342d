"""``Quantizer``: sliders over the storage of a model, and what it costs. Wiring only.

Traits ↔ study ↔ panel.
"""

from __future__ import annotations

from collections.abc import Generator
from fnmatch import fnmatchcase
from typing import Any

import traitlets as T

from qlab import registry
from qlab.core.config.code import code_line
from qlab.core.config.quant import QuantConfig, QuantPlan
from qlab.core.evaluate.text import EvalReport
from qlab.core.panels.quantizer import PanelState
from qlab.core.progress import Progress
from qlab.core.quantize.allocate import allocate
from qlab.core.quantize.compare import compare
from qlab.core.quantize.report import QuantReport, report_of
from qlab.engine.io.loaded import Loaded
from qlab.errors import ConfigError, LayerNotFoundError, named, nearest, sealed
from qlab.lab.model import Model
from qlab.lab.panel import HasPanel, PanelViews
from qlab.runtime.device import machine
from qlab.runtime.job import Latest, mlx_call
from qlab.views.cards.compare import Comparison
from qlab.views.quantizer.static import html, page, text_line
from qlab.views.quantizer.widget import QuantizerPanel

AUTO_PREDICT_SIZE = 1e9  # parameters up to which ΔKL is predicted without being asked
RELIABLE_ERROR = 0.5  # weight error up to which allocate trusts the predicted ΔKL
_KEEP: Any = object()


@named
@sealed
class Quantizer(HasPanel, T.HasTraits):
    """Storage of a model's weights, chosen by traits, sliders or code, with its error and size at
    once.

    As the last line of a cell it is a panel. The traits and the sliders are one state in both
    directions.

    Args:
        model: what ``qlab.load`` returned.
        bits: bits per code.
        group_size: weights that share a scale.
        mode: a scheme on the shelf.
        solver: how codes are chosen when quantizing: ``rtn`` or ``searched``.
        text: for calibration; a path, a string, rows, or a ``datasets`` set. None is the embedded
            text.

    Raises:
        ConfigError: unknown mode or solver, or bits or group size that the mode does not have.
    """

    _views = PanelViews(panel=QuantizerPanel, text_line=text_line, html=html, page=page)

    mode = T.Unicode("affine")
    bits = T.Int(4)
    group_size = T.Int(64)
    solver = T.Unicode("rtn")
    overrides = T.Dict()  # by layer path; replaced as a whole, so that who observes it is told

    def __init__(
        self,
        model: Model,
        bits: int | None = None,
        group_size: int | None = None,
        mode: str = "affine",
        solver: str = "rtn",
        text: Any = None,
    ) -> None:
        if not isinstance(model, Model):
            raise ConfigError(f"model={model!r} is not legal; give what qlab.load returned.")
        first = QuantConfig(mode, bits, group_size)
        registry.get("solvers", solver)
        super().__init__()
        self._model = model
        self._text = text
        self._jobs = Latest(self._show)
        self._measure: str | None = None
        self._machine = mlx_call(machine)
        with self.hold_trait_notifications():
            self.mode = first.mode
            self.bits = first.bits
            self.group_size = first.group_size
            self.solver = solver
        self.observe(self._on_trait, ["mode", "bits", "group_size", "solver", "overrides"])
        self._jobs.start(self._open)

    @property
    def model(self) -> Model:
        """What is quantized."""
        return self._model

    # --- the choice -------------------------------------------------------------------------------

    @property
    def config(self) -> QuantConfig:
        """Storage of every layer that has no override."""
        return QuantConfig(self.mode, self.bits, self.group_size)

    @property
    def plan(self) -> QuantPlan:
        """Storage of every layer; its repr pastes back."""
        return QuantPlan(self.config, {p: c for p, c in self.overrides.items() if c != self.config})

    @property
    def code(self) -> str:
        """The Python that rebuilds this state."""
        return code_line(self.plan, self.solver)

    def set(
        self,
        path: str,
        bits: int | None = _KEEP,
        *,
        group_size: int | None = None,
        mode: str | None = None,
    ) -> None:
        """Give one layer, or all that match a pattern, their own storage.

        Args:
            path: of a layer, or a pattern such as ``*.down_proj``.
            bits: bits per code; None keeps the layer at its own precision.
            group_size: None takes the current one, if the mode has it.
            mode: None takes the current one.

        Raises:
            LayerNotFoundError: nothing matches; names the nearest layer.
            ConfigError: the storage is not legal, or cannot hold the layer.
        """
        paths = self._matching(path)
        config = None
        if bits is not None:
            mode = mode or self.mode
            group_size = group_size or (self.group_size if mode == self.mode else None)
            config = QuantConfig(mode, self.bits if bits is _KEEP else bits, group_size)
            for found in paths:
                if reason := self._model.spec[found].refusal(config):
                    raise ConfigError(
                        f"Layer {found!r} cannot be stored as {config.label}: {reason}."
                    )
        self._change(dict.fromkeys(paths, config))

    def unset(self, path: str = "*") -> None:
        """Drop the overrides of one layer, or of all that match a pattern.

        Raises:
            LayerNotFoundError: nothing matches.
        """
        dropped = set(self._matching(path))
        with self._lock:
            self.overrides = {p: c for p, c in self.overrides.items() if p not in dropped}

    def allocate(self, bits_per_weight: float) -> QuantPlan:
        """Choose bits per layer for the least predicted ΔKL under a budget, and set them as
        overrides.

        Args:
            bits_per_weight: over all weights of the layers that have a prediction; others keep
                their setting.

        Raises:
            ConfigError: even the smallest storage is larger; gives the smallest budget.
        """
        study = self._model.study
        spec = self._model.spec
        if study.calibration is None:
            self.predict()
        table = study.measurer.table
        rows = [i for i, config in enumerate(table.configs) if config.mode == self.mode]
        cost = table.measure("kl_nats")[rows]
        # the prediction is of second order: where a layer's weights move by half their norm it
        # means nothing
        cost[~(table.measure("relative_error")[rows] < RELIABLE_ERROR)] = float("nan")
        columns = [i for i in range(len(spec.layers)) if (cost[:, i] >= 0).any()]
        cost = cost[:, columns]
        weights = sum(spec.layers[i].size for i in columns)
        option = allocate(cost, table.nbytes[rows][:, columns], weights, bits_per_weight)
        chosen = {
            spec.layers[c].path: table.configs[rows[o]]
            for c, o in zip(columns, option, strict=True)
        }
        self._change(chosen)
        return self.plan

    # --- what it costs ----------------------------------------------------------------------------

    @property
    def report(self) -> QuantReport:
        """Errors and sizes of the current plan: sampled or exact, each layer says which.

        Waits for the first look.
        """
        report = self._report()
        if any(layer.depth == "unknown" for layer in report.layers):
            self._jobs.run(self._first_look)
            report = self._report()
        return report

    def measure(self, exact: bool = True) -> QuantReport:
        """Measure the current plan, on all weights if ``exact``; blocks.

        Raises:
            WeightsError: a layer holds NaN or infinity.
        """
        self._jobs.run(lambda: self._model.study.look(self.config))
        if exact:
            self._jobs.run(lambda: self._model.study.exact(self.plan))
        return self._report()

    def predict(self, text: Any = None) -> QuantReport:
        """Predict ΔKL of every slider position from one pass over a text; blocks.

        Args:
            text: a path, a string, rows, or a ``datasets`` set; None is the quantizer's own text.
        """
        self._jobs.run(lambda: self._predict(self._text if text is None else text))
        return self._report()

    def judge(self, text: Any = None, tokens: int = 1024) -> EvalReport:
        """Measure the current plan and solver end to end on held-out text: KL, perplexity, flips.

        Blocks.
        """
        return self._jobs.run(lambda: self._model.study.judge(self.plan, self.solver, text, tokens))

    def judge_layers(self, count: int = 5) -> dict[str, float]:
        """Measure the true KL in nats per token of the worst layers, each quantized alone; blocks."""
        worst = [layer.path for layer in self.report.worst(count)]
        return self._jobs.run(lambda: self._model.study.judge_layers(worst, self.plan))

    def compare(self) -> Comparison:
        """Compare every scheme on the shelf, bits per weight against error.

        Blocks until all are sampled.
        """
        self._jobs.run(lambda: self._model.study.look(self.config))
        return Comparison(compare(self._model.spec, self._model.study.measurer.table))

    def quantize(self, solver: str | None = None, calibration: Any = None) -> Model:
        """Quantize into a new model; this quantizer and its model stay as they are. Blocks.

        Args:
            solver: None takes the trait.
            calibration: text for solvers that need one; None is the quantizer's own text.

        Raises:
            WeightsError: NaN or infinite weights, or nothing that could be quantized.
            ConfigError: the solver cannot fill the mode.
        """
        name = solver or self.solver
        plan = self.plan
        model = self._model
        self._check_solver(name)
        text = self._text if calibration is None else calibration
        module = self._jobs.run(lambda: model.study.quantize(plan, name, text))
        return Model(Loaded(module, model.tokenizer, model.config, model.name), plan, name, model)

    # --- the panel --------------------------------------------------------------------------------

    def state(self) -> PanelState:
        """What the panel shows now, as a value."""
        study = self._model.study
        plan = self.plan
        judged = study.judged.get((plan, self.solver))
        calibration = study.calibration.text if study.calibration else ""
        return PanelState(
            spec=self._model.spec,
            table=study.measurer.table.snapshot(),
            plan=plan,
            solver=self.solver,
            solvers=tuple((s.name, s.title) for s in registry.shelf("solvers").values()),
            modes=tuple(
                (s.name, s.title, s.bits, s.group_sizes, s.default_bits, s.default_group_size)
                for s in registry.shelf("schemes").values()
            ),
            machine=self._machine,
            calibration=calibration,
            totals=self._judged(judged),
            progress=self._jobs.progress,
            error=self._jobs.error,
            code=self.code,
            measure=self._measure or ("kl_nats" if calibration else "relative_error"),
        )

    def _judged(self, whole: EvalReport | None) -> tuple[tuple[str, float], ...]:
        """What was measured end to end of the present plan.

        True KL by layer, and the plan's own numbers by name.
        """
        alone = self._model.study.layers_judged
        found = [
            (path, kl)
            for (path, config), kl in alone.items()
            if self.plan.config_for(path) == config
        ]
        if whole is not None:
            found += [
                (name, getattr(whole, name))
                for name in ("kl_nats", "perplexity", "perplexity_before")
            ]
        return tuple(found)

    def _stop_work(self) -> None:
        self._jobs.stop()

    # --- within -----------------------------------------------------------------------------------

    @T.validate("mode", "solver")
    def _valid_name(self, proposal: Any) -> str:
        return registry.get(
            "schemes" if proposal["trait"].name == "mode" else "solvers", proposal["value"]
        ).name

    @T.validate("overrides")
    def _valid_overrides(self, proposal: Any) -> Any:
        plan = QuantPlan(self.config, proposal["value"])
        return {self._model.spec[path].path: config for path, config in plan.overrides.items()}

    @T.validate("bits", "group_size")
    def _valid_size(self, proposal: Any) -> int:
        name = proposal["trait"].name
        return getattr(QuantConfig(self.mode, **{name: proposal["value"]}), name)

    def _on_trait(self, change: Any) -> None:
        if change["name"] == "mode":  # bits and group size follow to the nearest that the mode has
            scheme = registry.get("schemes", self.mode)
            with self.hold_trait_notifications():
                self.bits = min(scheme.bits, key=lambda b: abs(b - self.bits))
                self.group_size = min(scheme.group_sizes, key=lambda g: abs(g - self.group_size))
        self._show()

    def _check_solver(self, name: str) -> None:
        modes = registry.get("solvers", name).modes
        if modes is not None and self.mode not in modes:
            raise ConfigError(
                f"Solver {name!r} fills mode {', '.join(modes)}, not {self.mode!r}; use solver 'rtn'."
            )

    def _matching(self, pattern: str) -> list[str]:
        paths = [layer.path for layer in self._model.spec.layers]
        found = [path for path in paths if isinstance(pattern, str) and fnmatchcase(path, pattern)]
        if not found:
            name = self._model.spec.name
            raise LayerNotFoundError(
                f"The model {name!r} has no layer {pattern!r}.{nearest(pattern, paths)}"
            )
        return found

    def _change(self, overrides: dict[str, QuantConfig | None]) -> None:
        with self._lock:
            self.overrides = {**self.overrides, **overrides}

    def _report(self) -> QuantReport:
        study = self._model.study
        text = study.calibration.text if study.calibration else ""
        return report_of(self._model.spec, study.measurer.table, self.plan, text)

    def _open(self) -> Generator[Progress, None, None]:
        """What happens by itself: a first look, then the prediction if the model is small."""
        yield from self._model.study.look(self.config)
        if self._model.study.calibration is None and self._model.spec.size <= AUTO_PREDICT_SIZE:
            yield from self._model.study.predict(self._text)

    def _first_look(self) -> Generator[Progress, None, None]:
        for event in self._model.study.look(self.config):
            yield event
            if not any(layer.depth == "unknown" for layer in self._report().layers):
                return

    def _predict(self, text: Any) -> Generator[Progress, None, None]:
        yield from self._model.study.look(self.config)
        yield from self._model.study.predict(text)

    def _do_set(self, intent: dict[str, Any]) -> None:
        wanted = QuantConfig(intent["mode"], intent["bits"], intent["group_size"])
        with self.hold_trait_notifications():
            self.mode = wanted.mode
            self.bits = wanted.bits
            self.group_size = wanted.group_size

    def _do_solver(self, intent: dict[str, Any]) -> None:
        self.solver = intent["solver"]

    def _do_measure(self, intent: dict[str, Any]) -> None:
        self._measure = intent["measure"]

    def _do_override(self, intent: dict[str, Any]) -> None:
        config = intent["config"]
        if config == "default":
            for path in intent["paths"]:
                self.unset(path)
            return
        wanted = QuantConfig(*config) if config else None
        self._change(
            dict.fromkeys((self._model.spec[path].path for path in intent["paths"]), wanted)
        )

    def _do_compute(self, intent: dict[str, Any]) -> None:
        study = self._model.study
        plan = self.plan
        solver = self.solver
        work = {
            "kl": lambda: self._predict(self._text),
            "exact": lambda: study.exact(plan),
            "plan": lambda: study.judge(plan, solver),
            "layer_kl": lambda: study.judge_layers([x.path for x in self._report().worst()], plan),
        }
        self._jobs.start(work[intent["what"]])

    def _do_cancel(self, intent: dict[str, Any]) -> None:
        self._jobs.stop()
