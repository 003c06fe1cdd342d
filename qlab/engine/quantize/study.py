"""Everything that is measured of one model, and the order in which it is done.

Look, predict, measure, judge, quantize.

One ``Study`` belongs to one model; panels on the same model share it. Its methods are generators
for the MLX thread. Knows no panel.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qlab import registry
from qlab.core.config.quant import QuantConfig, QuantPlan
from qlab.core.config.spec import ModelSpec
from qlab.core.evaluate.text import EvalReport
from qlab.core.progress import Progress
from qlab.engine.data.text import batches
from qlab.engine.evaluate.divergence import evaluate, layer_kl
from qlab.engine.models.surgery import cast, map_layers, module_at, twin
from qlab.engine.quantize import quantize as export
from qlab.engine.quantize.fisher import Calibration, calibrate
from qlab.engine.quantize.measurer import Measurer
from qlab.nn.linear import is_quantized, weight_of
from qlab.nn.stored import dense_layer
from qlab.runtime.device import wants_float32

CALIBRATION_TOKENS = 2048
JUDGING_TOKENS = 1024


class Study:
    """Measurements of one model.

    Args:
        module: mlx-lm's model; never changed.
        tokenizer: mlx-lm's wrapper.
        spec: the model's layers.

    Attributes:
        measurer: the error table.
        judged: measured end-to-end numbers, by plan and solver.
        layers_judged: true KL of single layers, by path and config.
    """

    def __init__(self, module: nn.Module, tokenizer: Any, spec: ModelSpec) -> None:
        self.module = module
        self._tokenizer = tokenizer
        self.spec = spec
        self.measurer = Measurer(spec.layers, lambda path: weight_of(module_at(module, path)))
        self.judged: dict[tuple[QuantPlan, str], EvalReport] = {}
        self.layers_judged: dict[tuple[str, QuantConfig], float] = {}

    @property
    def calibration(self) -> Calibration | None:
        """What the text told about the weights, or None before ``predict``."""
        return self.measurer.calibration

    def look(self, first: QuantConfig) -> Generator[Progress, None, None]:
        """Fill the table from samples, the given config first."""
        yield from self.measurer.sample(first)

    def predict(
        self, text: Any = None, tokens: int = CALIBRATION_TOKENS
    ) -> Generator[Progress, None, Calibration]:
        """Predict ΔKL of every config, from one forward and backward pass over a text.

        Args:
            text: see ``engine.data.text.read_text``; None is the embedded text.
            tokens: to use at most.
        """
        rows, words = batches(
            self._tokenizer, text, "calibration.txt", tokens, self.spec.vocabulary
        )
        shapes = {
            x.path: x.shape for x in self.spec.layers if x.kind != "switch" and not x.obstacle
        }
        full = self.full_model()
        found = yield from calibrate(full, shapes, rows, words)
        yield from self.measurer.predict(found)
        return found

    def exact(self, plan: QuantPlan) -> Generator[Progress, None, None]:
        """Measure a plan on all weights."""
        configs = export.chosen(self.spec, plan)
        yield from self.measurer.exact([configs.get(layer.path) for layer in self.spec.layers])

    def judge(
        self, plan: QuantPlan, solver: str, text: Any = None, tokens: int = JUDGING_TOKENS
    ) -> Generator[Progress, None, EvalReport]:
        """Measure a plan end to end on held-out text: KL to this model, perplexity, flips.

        Args:
            plan: the storage.
            solver: name of a solver.
            text: see ``engine.data.text.read_text``; None is the embedded held-out text.
            tokens: to use at most.
        """
        yield from self._inputs(solver)
        rows, _ = batches(self._tokenizer, text, "heldout.txt", tokens, self.spec.vocabulary)
        full = self.full_model()
        student = yield from export.dense_twin(
            self.module, self.spec, plan, solver, self.input_power(), full
        )
        report = yield from evaluate(full, student, rows)
        if text is None:
            self.judged[plan, solver] = report
        return report

    def judge_layers(
        self, paths: list[str], plan: QuantPlan, text: Any = None, tokens: int = JUDGING_TOKENS // 2
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
        rows, _ = batches(self._tokenizer, text, "heldout.txt", tokens, self.spec.vocabulary)
        full = self.full_model()
        students = {}
        for path, config in (
            (p, c) for p, c in export.chosen(self.spec, plan).items() if p in paths
        ):
            target = module_at(full, path)
            packed = config.scheme.quantize(weight_of(module_at(self.module, path)), config)
            values = config.scheme.dequantize(packed, config, target.weight.dtype)
            mx.eval(values)
            students[path] = twin(full, {path: dense_layer(target, values)})
        found = yield from layer_kl(full, students, rows)
        self.layers_judged.update({(path, plan.config_for(path)): kl for path, kl in found.items()})
        return found

    def quantize(
        self, plan: QuantPlan, solver: str, text: Any = None
    ) -> Generator[Progress, None, nn.Module]:
        """Quantize the model into a new one."""
        yield from self._inputs(solver, text)
        made = yield from export.quantize(self.module, self.spec, plan, solver, self.input_power())
        return made

    def input_power(self) -> dict[str, Any]:
        """Mean squares of every layer's input features, by path; empty before a calibration."""
        return self.calibration.input_power if self.calibration else {}

    def full_model(self) -> nn.Module:
        """Return the model to compute with.

        Dense float32 where 16-bit and quantized products are slow, else itself.
        """
        if not wants_float32():
            return self.module
        packed = [path for path, leaf in self.module.named_modules() if is_quantized(leaf)]
        made = map_layers(self.module, packed, lambda _, leaf: dense_layer(leaf, weight_of(leaf)))
        return cast(made, mx.float32)

    def _inputs(self, solver: str, text: Any = None) -> Generator[Progress, None, None]:
        if registry.get("solvers", solver).needs_inputs and (
            self.calibration is None or text is not None
        ):
            yield from self.predict(text)
