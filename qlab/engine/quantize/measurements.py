"""Everything that is measured of one model, in the order in which a user asks for it.

``lab.Model`` holds one ``ModelMeasurements``; all panels on the model share it, so nothing is
measured twice. Its methods are generators for the MLX thread (``runtime.job``)::

    measured = ModelMeasurements(model.module, model.tokenizer, model.spec)
    Job(lambda: measured.sample(QuantConfig(bits=4))).start().wait()
    measured.table.measure("relative_error")      # (configs, layers)
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qlab import registry
from qlab.core.config.quant import QuantConfig, QuantPlan
from qlab.core.config.spec import ModelSpec
from qlab.core.evaluate.text import EvalReport
from qlab.core.progress import Progress
from qlab.core.quantize.table import ErrorTable
from qlab.engine.data.text import batches
from qlab.engine.evaluate.divergence import compare_on_text, layer_kl
from qlab.engine.models.surgery import cast, map_layers, module_at, twin
from qlab.engine.quantize.fisher import Calibration, calibrate
from qlab.engine.quantize.quantize import chosen, dense_twin, quantize
from qlab.engine.quantize.table_filler import TableFiller, all_configs
from qlab.nn.linear import is_quantized, weight_of
from qlab.nn.stored import dense_layer
from qlab.runtime.device import wants_float32

CALIBRATION_TOKENS = 2048
EVALUATION_TOKENS = 1024


class ModelMeasurements:
    """Measurements of one model.

    Args:
        module: mlx-lm's model; never changed.
        tokenizer: mlx-lm's wrapper.
        spec: the model's layers.

    Attributes:
        table: errors of every config for every layer; give away ``table.snapshot()``.
        evaluations: what was measured end to end, by plan and solver.
        true_layer_kl: true KL of single layers in nats per token, by path and config.
    """

    def __init__(self, module: nn.Module, tokenizer: Any, spec: ModelSpec) -> None:
        self.module = module
        self.spec = spec
        self.table = ErrorTable.empty(spec.layers, all_configs())
        self.evaluations: dict[tuple[QuantPlan, str], EvalReport] = {}
        self.true_layer_kl: dict[tuple[str, QuantConfig], float] = {}
        self._tokenizer = tokenizer
        self._filler = TableFiller(self.table, self._weight)

    @property
    def calibration(self) -> Calibration | None:
        """Importance of the weights, or None before ``predict``."""
        return self._filler.calibration

    def sample(self, first: QuantConfig) -> Generator[Progress, None, None]:
        """Fill the table from samples of all layers, the config ``first`` before all others."""
        yield from self._filler.sample(first)

    def measure_exactly(self, plan: QuantPlan) -> Generator[Progress, None, None]:
        """Measure the errors of a plan on all weights."""
        configs = chosen(self.spec, plan)
        yield from self._filler.measure_exactly(
            [configs.get(layer.path) for layer in self.spec.layers]
        )

    def predict(
        self, text: Any = None, tokens: int = CALIBRATION_TOKENS
    ) -> Generator[Progress, None, Calibration]:
        """Predict ΔKL of every config, from one forward and backward pass over a text.

        Args:
            text: see ``engine.data.text.read_text``; None is the embedded text.
            tokens: to use at most.
        """
        rows, description = batches(
            self._tokenizer, text, "calibration.txt", tokens, self.spec.vocabulary
        )
        shapes = {
            layer.path: layer.shape
            for layer in self.spec.layers
            if layer.kind != "switch" and not layer.obstacle
        }
        calibration = yield from calibrate(self.full_model(), shapes, rows, description)
        yield from self._filler.predict(calibration)
        return calibration

    def evaluate(
        self, plan: QuantPlan, solver: str, text: Any = None, tokens: int = EVALUATION_TOKENS
    ) -> Generator[Progress, None, EvalReport]:
        """Measure a plan end to end on held-out text: KL to this model, perplexity, flips.

        Args:
            plan: the storage.
            solver: name of a solver.
            text: see ``engine.data.text.read_text``; None is the embedded held-out text.
            tokens: to use at most.
        """
        yield from self._inputs_for(solver)
        rows = self._heldout(text, tokens)
        full = self.full_model()
        student = yield from dense_twin(
            self.module, self.spec, plan, solver, self.input_power(), full
        )
        report = yield from compare_on_text(full, student, rows)
        if text is None:
            self.evaluations[plan, solver] = report
        return report

    def evaluate_layers(
        self,
        paths: Iterable[str],
        plan: QuantPlan,
        text: Any = None,
        tokens: int = EVALUATION_TOKENS // 2,
    ) -> Generator[Progress, None, dict[str, float]]:
        """Measure the true KL of quantizing single layers, each alone.

        Args:
            paths: of the layers.
            plan: gives their configs.
            text: see ``engine.data.text.read_text``; None is the embedded held-out text.
            tokens: to use at most.

        Returns:
            Mean KL in nats per token, by path.
        """
        rows = self._heldout(text, tokens)
        full = self.full_model()
        wanted = set(paths)
        students = {
            path: self._with_one_quantized(full, path, config)
            for path, config in chosen(self.spec, plan).items()
            if path in wanted
        }
        kl = yield from layer_kl(full, students, rows)
        for path, nats in kl.items():
            config = plan.config_for(path)
            if config is not None:
                self.true_layer_kl[path, config] = nats
        return kl

    def quantize(
        self, plan: QuantPlan, solver: str, text: Any = None
    ) -> Generator[Progress, None, nn.Module]:
        """Quantize the model into a new one.

        Args:
            plan: the storage.
            solver: name of a solver.
            text: for solvers that need a calibration; None takes the one that was made, or the
                embedded text.
        """
        yield from self._inputs_for(solver, text)
        return (yield from quantize(self.module, self.spec, plan, solver, self.input_power()))

    def input_power(self) -> dict[str, Any]:
        """Mean squares of every layer's input features, by path; empty before a calibration."""
        return self.calibration.input_power if self.calibration else {}

    def full_model(self) -> nn.Module:
        """Return the model to compute with: itself, or a dense float32 copy where that is faster.

        It is a copy where 16-bit and quantized products are slow (``runtime.device``).
        """
        if not wants_float32():
            return self.module
        packed = [path for path, leaf in self.module.named_modules() if is_quantized(leaf)]
        dense = map_layers(self.module, packed, lambda _, leaf: dense_layer(leaf, weight_of(leaf)))
        return cast(dense, mx.float32)

    def _weight(self, path: str) -> mx.array:
        return weight_of(module_at(self.module, path))

    def _heldout(self, text: Any, tokens: int) -> list[mx.array]:
        rows, _ = batches(self._tokenizer, text, "heldout.txt", tokens, self.spec.vocabulary)
        return rows

    def _with_one_quantized(self, full: nn.Module, path: str, config: QuantConfig) -> nn.Module:
        """A twin of the dense model in which one layer holds its dequantized weights."""
        target = module_at(full, path)
        packed = config.scheme.quantize(self._weight(path), config)
        values = config.scheme.dequantize(packed, config, target.weight.dtype)
        mx.eval(values)
        return twin(full, {path: dense_layer(target, values)})

    def _inputs_for(self, solver: str, text: Any = None) -> Generator[Progress, None, None]:
        """Calibrate, if the solver needs inputs that have not been seen."""
        if not registry.get("solvers", solver).needs_inputs:
            return
        if self.calibration is None or text is not None:
            yield from self.predict(text)
