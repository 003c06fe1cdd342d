"""``Forecast``: a model, seen as the memory that training it takes.

It answers on three levels: by formula at once (``formulas``), by a trace of the whole step
(``step_graphs``, ``trace``), or by running one real step (``measure``). Reads no weights, a real
step aside. Runs on the MLX thread; ``qlab.lab.estimate`` asks it.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.nn as nn

from qlab.core.config.quant import QuantPlan
from qlab.core.graph.formula import Formula
from qlab.core.graph.graph import Graph
from qlab.core.graph.parts import INPUTS
from qlab.core.graph.sizes import sizes
from qlab.core.machine import Machine
from qlab.core.memory.estimate import MemoryEstimate
from qlab.core.memory.setup import Setup
from qlab.engine.memory.formulas import Formulas
from qlab.engine.memory.inputs import input_nbytes, trained_shapes
from qlab.engine.memory.measure import measured_peak
from qlab.engine.memory.step_graphs import StepGraphs
from qlab.engine.memory.step_kind import StepKind, step_kind
from qlab.engine.memory.trace import StepPeak, traced_peak
from qlab.engine.models.skeleton import describe
from qlab.engine.quantize.quantize import chosen, quantize
from qlab.errors import ConfigError, UnsupportedError
from qlab.runtime import peaks
from qlab.runtime.device import backend
from qlab.runtime.job import run_to_end


class Forecast:
    """What is known of a model's memory in training.

    Example:
        >>> forecast = mlx_call(Forecast, module, "demo")
        >>> mlx_call(forecast.estimate, Setup(), budget("16 GB Mac")).total_nbytes

    Args:
        module: an mlx-lm model, lazy or loaded. It is not changed.
        name: what to call it.
        context: tokens that it was made for, or None.
        loaded: whether its weights are in memory.
        notes: sentences about its source, which every estimate repeats.

    Attributes:
        spec: its layers.
        graphs: its steps as graphs.
        loaded_nbytes: bytes of its weights in memory; 0 if they are not loaded.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        context: int | None = None,
        loaded: bool = False,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.module = module
        self.context = context
        self.notes = notes
        self.spec = describe(module, name)
        self.loaded_nbytes = self.spec.nbytes if loaded else 0
        # the head, or an embedding that serves as one, has a row for each token
        heights = [layer.shape[-2] for layer in self.spec.layers if layer.block is None]
        self._vocabulary = max(heights, default=0)
        self.graphs = StepGraphs(module, self.spec)
        self._formulas = Formulas(self.graphs, self.spec, self._vocabulary)

    def estimate(self, setup: Setup, machine: Machine, level: str = "formula") -> MemoryEstimate:
        """Return the peak of a setup.

        Where a formula or a trace cannot be had, the other is returned, with a note.

        Args:
            setup: storage, adapter, run.
            machine: the budget to judge by.
            level: ``formula``, ``traced`` or ``measured`` (runs one real step; the model must be
                loaded).

        Raises:
            ConfigError, LayerNotFoundError: the setup does not fit the model.
            UnsupportedError: the model's step cannot be built.
        """
        self._check_length(setup)
        self._check_plan(setup.plan)
        predicted_level = "formula" if level == "formula" else "traced"
        found_level, peak, notes = self._predict(setup, predicted_level)
        parts = {name: round(nbytes) for name, nbytes in peak.parts.items()}
        measured = None
        band = peaks.band(backend())
        if level == "measured":
            found_level = level
            measured = self.by_step(setup, machine)
            exact = sum(parts[name] for name in INPUTS)
            # later bands on this machine learn from how far the prediction was off
            peaks.add(backend(), sum(parts.values()), exact, measured)
            parts = _scaled(parts, measured)
            band = (1.0, 1.0)
        return MemoryEstimate(
            spec=self.spec,
            setup=setup,
            parts=parts,
            level=found_level,
            moment=peak.moment,
            band=band,
            machine=machine,
            context=self.context,
            measured_peak=measured,
            notes=(*self.notes, *notes),
        )

    def _check_length(self, setup: Setup) -> None:
        length = setup.train.max_seq_length
        if self.context and length > self.context:
            raise ConfigError(
                f"max_seq_length={length} is more than {self.spec.name!r} was made for; "
                f"the largest is {self.context}."
            )

    def _check_plan(self, plan: QuantPlan | None) -> None:
        """Refuse a storage that would quantize no layer."""
        if plan is None or chosen(self.spec, plan):
            return
        largest = max(self.spec.layers, key=lambda layer: layer.size)
        reason = largest.refusal(plan.default) or "every layer is to be kept as it is"
        raise ConfigError(
            f"No layer of {self.spec.name!r} can be stored as {plan.default.label} "
            f"({largest.path}: {reason})."
        )

    def _predict(self, setup: Setup, level: str) -> tuple[str, StepPeak, tuple[str, ...]]:
        """Return the level that could be had, the peak, and notes about both."""
        notes: tuple[str, ...] = ()
        if self.graphs.must_be_whole(setup):
            reason = self.graphs.why_whole
            notes = (
                f"Computed as one graph, without checkpoints and chunks of the loss: {reason}",
            )
        ways = {"formula": self.by_formula, "traced": self.by_trace}
        other = "traced" if level == "formula" else "formula"
        try:
            return level, ways[level](setup), notes
        except UnsupportedError as error:
            try:
                peak = ways[other](setup)
            except UnsupportedError:
                raise error from None
            note = f"This is {other}, because {level} could not be had: {error}"
            return other, peak, (*notes, note)

    # --- levels -----------------------------------------------------------------------------------

    def by_formula(self, setup: Setup) -> StepPeak:
        """Return the peak by the formula of the setup's kind of step."""
        train = setup.train
        values = sizes(train.batch_size, train.max_seq_length, setup.adapter.rank, train.loss_chunk)
        moment, parts = self.formula(setup).parts(values, self.kind(setup).counts)
        return self._with_inputs(moment, parts, setup)

    def by_trace(self, setup: Setup) -> StepPeak:
        """Return the peak by the graph of the whole step."""
        shapes = trained_shapes(setup.adapter, self.spec)
        peak = traced_peak(self.graph(setup), self._vocabulary, shapes)
        return self._with_inputs(peak.moment, peak.parts, setup)

    def by_step(self, setup: Setup, machine: Machine) -> int:
        """Run one real step on random tokens of the largest shape and return the bytes of its peak.

        Raises:
            ConfigError: the weights are not loaded, or it surely would not fit.
        """
        if not self.loaded_nbytes:
            raise ConfigError("A real step needs the weights: load the model first.")
        predicted = sum(self.by_formula(setup).parts.values())
        free = machine.free_nbytes
        if predicted > free:
            raise ConfigError(
                f"A real step would need {predicted / 1e9:.1f} GB, "
                f"and {free / 1e9:.1f} GB are free."
            )
        module = self.module
        if setup.plan:
            module = run_to_end(quantize(module, self.spec, setup.plan, "rtn", {}))
        return measured_peak(module, setup)

    def _with_inputs(self, moment: str, parts: Mapping[str, float], setup: Setup) -> StepPeak:
        """Return a peak in whole bytes, in which weights, adapter and optimizer are exact."""
        exact = {**parts, **self.inputs(setup)}
        return StepPeak(moment, {name: round(nbytes) for name, nbytes in exact.items()})

    # --- what they are read from ------------------------------------------------------------------

    def inputs(self, setup: Setup) -> dict[str, int]:
        """Return the exact bytes of ``weights``, ``adapter`` and ``optimizer``."""
        return input_nbytes(self.spec, setup)

    def kind(self, setup: Setup) -> StepKind:
        """Return the kind of a setup's step.

        Raises:
            ConfigError, LayerNotFoundError: the setup does not fit the model.
        """
        return step_kind(self.spec, setup)

    def formula(self, setup: Setup) -> Formula:
        """Return the formula of a setup's kind of step; it is read at its first use."""
        return self._formulas.of(setup)

    def graph(self, setup: Setup) -> Graph:
        """Return the whole step of a setup as a graph; nothing is computed."""
        return self.graphs.of_setup(setup)


def _scaled(parts: dict[str, int], total: int) -> dict[str, int]:
    """Return parts that sum to a measured total.

    What is exact stays; the rest is scaled in the predicted proportions.
    """
    exact = sum(parts[name] for name in INPUTS)
    predicted_rest = max(sum(parts.values()) - exact, 1)
    factor = max(total - exact, 0) / predicted_rest
    scaled = {}
    for name, nbytes in parts.items():
        scaled[name] = nbytes if name in INPUTS else round(nbytes * factor)
    scaled["in_flight"] += total - sum(scaled.values())  # what rounding left over
    return scaled
