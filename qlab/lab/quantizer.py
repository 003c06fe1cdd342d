"""``Quantizer``: sliders that choose how weights are stored, and what the choice costs.

The choice is traits (``quantizer_traits``); what it costs is measured on the MLX thread
(``ModelMeasurements``); what is shown is a ``QuantizerState``. This file connects the three.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from qlab import registry
from qlab.core.config.legal import check_flag, check_whole
from qlab.core.config.quant import QuantConfig, QuantPlan
from qlab.core.evaluate.text import EvalReport
from qlab.core.panels.quantizer import QuantizerState, mode_choices, solver_choices
from qlab.core.progress import Progress
from qlab.core.quantize.allocate import check_budget, overrides_within
from qlab.core.quantize.compare import CompareReport, compare
from qlab.core.quantize.report import QuantReport, report_of
from qlab.deprecated import positional_arguments
from qlab.engine.io.loaded import Loaded
from qlab.errors import ConfigError, reject_unknown_arguments, reject_unknown_attributes
from qlab.lab.model import Model
from qlab.lab.panel import HasPanel, PanelViews
from qlab.lab.quantizer_traits import STORAGE_TRAITS, QuantizerChoice, quant_config
from qlab.runtime.device import machine
from qlab.runtime.job import LatestJob, mlx_call
from qlab.views.quantizer.static import html, page, text_line
from qlab.views.quantizer.widget import QuantizerPanel

AUTO_PREDICT_SIZE = 1e9  # parameters up to which ΔKL is predicted without being asked
_END_TO_END = ("kl_nats", "perplexity", "perplexity_before")  # of an EvalReport, shown in the panel

Work = Generator[Progress, None, Any]


@reject_unknown_arguments
@reject_unknown_attributes
class Quantizer(HasPanel, QuantizerChoice):
    """Chooses how a model's weights are stored, and shows error and size of the choice at once.

    As the last line of a cell it is a panel. Its traits (``bits``, ``group_size``, ``mode``,
    ``solver``, ``overrides``) and the sliders are one state, in both directions. The model itself
    never changes.

    Example:
        >>> model = qlab.load("demo")
        >>> q = qlab.Quantizer(model, bits=4, group_size=64)
        >>> q.bits = 3
        >>> q.set("*.down_proj", bits=8)
        >>> q.report.worst(3)
        >>> small = q.quantize()

    Args:
        model: what ``qlab.load`` returned.
        bits: bits per stored weight; None is the mode's default.
        group_size: weights that share a scale; None is the mode's default.
        mode: name of a scheme on the shelf, such as ``affine`` or ``mxfp4``.
        solver: name of a solver on the shelf: how codes are chosen when quantizing.
        text: calibration text: a path, a string, rows, or a ``datasets`` set. None is the embedded
            text.

    Raises:
        ConfigError: unknown mode or solver, or bits or group size that the mode does not have.
    """

    _views = PanelViews(panel=QuantizerPanel, text_line=text_line, html=html, page=page)

    @positional_arguments
    def __init__(
        self,
        model: Model,
        *,
        bits: int | None = None,
        group_size: int | None = None,
        mode: str = "affine",
        solver: str = "rtn",
        text: Any = None,
    ) -> None:
        if not isinstance(model, Model):
            raise ConfigError(f"model={model!r} is not legal; give what qlab.load returned.")
        first = quant_config(mode, bits, group_size)
        super().__init__()
        self._model = model
        self._spec = model.spec
        self._text = text
        self._jobs = LatestJob(self._show)
        self._measure: str | None = None  # what the bars show, once it was chosen
        self._machine = mlx_call(machine)
        self._take(first)
        self.solver = solver
        self.observe(self._on_trait, list(STORAGE_TRAITS))
        self._jobs.start(self._open)

    @property
    def model(self) -> Model:
        """The model to quantize."""
        return self._model

    # --- what it costs ----------------------------------------------------------------------------

    @property
    def report(self) -> QuantReport:
        """Errors and sizes of the present plan, each layer sampled or exact as it says.

        Blocks until every layer was sampled once.
        """
        report = self._report()
        if _has_unknown(report):
            self._jobs.run(self._sample_until_known)
            report = self._report()
        return report

    def measure(self, exact: bool = True) -> QuantReport:
        """Measure the errors of the present plan; blocks.

        Args:
            exact: whether on all weights; False measures a random sample of each layer, as the
                panel does by itself.

        Returns:
            The report of the present plan.

        Raises:
            WeightsError: a layer holds NaN or infinity.
        """
        check_flag("exact", exact)
        self._jobs.run(self._sample)
        if exact:
            self._jobs.run(lambda: self._model.measurements.measure_exactly(self.plan))
        return self._report()

    def predict(self, text: Any = None) -> QuantReport:
        """Predict ΔKL of every slider position from one pass over a text; blocks.

        Args:
            text: a path, a string, rows, or a ``datasets`` set; None is the quantizer's own text.

        Returns:
            The report of the present plan, with ΔKL in nats per token.
        """
        chosen = self._text if text is None else text
        self._jobs.run(lambda: self._predict(chosen))
        return self._report()

    def compare(self) -> CompareReport:
        """Compare every scheme on the shelf: bits per weight against error.

        Blocks until all are sampled.
        """
        self._jobs.run(self._sample)
        return compare(self._spec, self._model.measurements.table)

    def allocate(self, bits_per_weight: float) -> QuantPlan:
        """Choose bits per layer for the least predicted ΔKL within a budget; set as overrides.

        Predicts ΔKL first if that has not been done, which blocks.

        Args:
            bits_per_weight: over all weights of the layers that have a prediction; the others keep
                their setting.

        Raises:
            ConfigError: even the smallest storage is larger; gives the smallest budget.
        """
        check_budget(bits_per_weight)
        measured = self._model.measurements
        if measured.calibration is None:
            self.predict()
        table = measured.table
        self._set_overrides(overrides_within(self._spec, table, self.mode, bits_per_weight))
        return self.plan

    # --- what it does to the output ---------------------------------------------------------------

    def evaluate(self, text: Any = None, tokens: int = 1024) -> EvalReport:
        """Measure the present plan and solver end to end on held-out text; blocks.

        Example:
            >>> report = q.evaluate()
            >>> report.kl_nats, report.perplexity, report.top1_flips

        Args:
            text: a path, a string, rows, or a ``datasets`` set that no calibration saw; None is the
                embedded held-out text.
            tokens: to use at most.

        Returns:
            KL to the unquantized model, perplexity before and after, changed top tokens.

        Raises:
            ConfigError: ``tokens`` is no whole number, or too small.
            DataError: there is no text in ``text``.
        """
        check_whole("tokens", tokens, 2)  # the second is the first that can be predicted
        measured = self._model.measurements
        return self._jobs.run(lambda: measured.evaluate(self.plan, self.solver, text, tokens))

    def evaluate_layers(self, count: int = 5) -> dict[str, float]:
        """Measure the true KL of the worst layers, each quantized alone; blocks.

        Args:
            count: number of layers, the worst of the present report first.

        Returns:
            KL to the unquantized model in nats per token, by layer path.
        """
        worst = [layer.path for layer in self.report.worst(count)]
        return self._jobs.run(lambda: self._model.measurements.evaluate_layers(worst, self.plan))

    judge = evaluate
    judge_layers = evaluate_layers

    # --- the quantized model ----------------------------------------------------------------------

    @positional_arguments
    def quantize(self, solver: str | None = None, *, calibration: Any = None) -> Model:
        """Quantize into a new model; this quantizer and its model stay as they are. Blocks.

        Example:
            >>> q.quantize(solver="searched").save("demo-4bit")

        Args:
            solver: None takes the trait.
            calibration: text for solvers that need one: a path, a string, rows, or a ``datasets``
                set. None is the quantizer's own text.

        Raises:
            WeightsError: NaN or infinite weights, or nothing that could be quantized.
            ConfigError: the solver cannot fill the mode.
        """
        name = solver or self.solver
        plan = self.plan
        model = self._model
        self._check_solver(name)
        text = self._text if calibration is None else calibration
        module = self._jobs.run(lambda: model.measurements.quantize(plan, name, text))
        loaded = Loaded(
            module=module, tokenizer=model.tokenizer, config=model.config, name=model.name
        )
        return Model(loaded, plan, name, model)

    def _check_solver(self, name: str) -> None:
        modes = registry.get("solvers", name).modes
        if modes is not None and self.mode not in modes:
            legal = ", ".join(modes)
            raise ConfigError(
                f"Solver {name!r} fills mode {legal}, not {self.mode!r}; use solver 'rtn'."
            )

    # --- the panel --------------------------------------------------------------------------------

    def state(self) -> QuantizerState:
        """What the panel shows now, as a value."""
        measured = self._model.measurements
        plan = self.plan
        calibration = self._calibration_text()
        measure = self._measure or ("kl_nats" if calibration else "relative_error")
        return QuantizerState(
            spec=self._spec,
            table=measured.table.snapshot(),
            plan=plan,
            solver=self.solver,
            solvers=solver_choices(),
            modes=mode_choices(),
            machine=self._machine,
            calibration=calibration,
            totals=self._evaluated(plan),
            progress=self._jobs.progress,
            error=self._jobs.error,
            code=self.code,
            measure=measure,
        )

    def _evaluated(self, plan: QuantPlan) -> tuple[tuple[str, float], ...]:
        """Return what was measured end to end of a plan.

        The true KL of single layers by path, then the numbers of the whole plan by name.
        """
        measured = self._model.measurements
        numbers = [
            (path, kl)
            for (path, config), kl in measured.true_layer_kl.items()
            if plan.config_for(path) == config
        ]
        whole = measured.evaluations.get((plan, self.solver))
        if whole is not None:
            numbers += [(name, getattr(whole, name)) for name in _END_TO_END]
        return tuple(numbers)

    def _stop_work(self) -> None:
        self._jobs.stop()

    def _on_trait(self, change: Any) -> None:
        self._show()

    # --- what the browser asks --------------------------------------------------------------------

    def _do_set(self, intent: dict[str, Any]) -> None:
        self._take(self._config_of(intent["mode"], intent["bits"], intent["group_size"]))

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
        paths = [self._spec[path].path for path in intent["paths"]]
        self._set_overrides(dict.fromkeys(paths, wanted))

    def _do_compute(self, intent: dict[str, Any]) -> None:
        measured = self._model.measurements
        plan = self.plan
        solver = self.solver
        work = {
            "kl": lambda: self._predict(self._text),
            "exact": lambda: measured.measure_exactly(plan),
            "plan": lambda: measured.evaluate(plan, solver),
            "layer_kl": lambda: measured.evaluate_layers(
                [x.path for x in self._report().worst()], plan
            ),
        }
        self._jobs.start(work[intent["what"]])

    def _do_cancel(self, intent: dict[str, Any]) -> None:
        self._jobs.stop()

    # --- work for the MLX thread ------------------------------------------------------------------

    def _open(self) -> Work:
        """What happens by itself: samples, then the prediction if the model is small."""
        measured = self._model.measurements
        yield from measured.sample(self.config)
        if measured.calibration is None and self._spec.size <= AUTO_PREDICT_SIZE:
            yield from measured.predict(self._text)

    def _sample(self) -> Work:
        yield from self._model.measurements.sample(self.config)

    def _sample_until_known(self) -> Work:
        """Sample until the present plan is known; a background job samples the rest."""
        for event in self._sample():
            yield event
            if not _has_unknown(self._report()):
                return

    def _predict(self, text: Any) -> Work:
        yield from self._sample()
        yield from self._model.measurements.predict(text)

    def _report(self) -> QuantReport:
        table = self._model.measurements.table
        return report_of(self._spec, table, self.plan, self._calibration_text())

    def _calibration_text(self) -> str:
        calibration = self._model.measurements.calibration
        return calibration.text if calibration is not None else ""


def _has_unknown(report: QuantReport) -> bool:
    return any(layer.depth == "unknown" for layer in report.layers)
