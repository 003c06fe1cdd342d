"""What adapters can recover of a model's quantization error, by storage, and the starts that do.

Joins a model's weights, its storage and what passes through it. Knows no panel. Its methods are
generators for the MLX thread.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qlab import registry
from qlab.core.adapt.recovery import Recovery
from qlab.core.config.lora import LoRAConfig
from qlab.core.config.quant import QuantPlan
from qlab.core.progress import Progress
from qlab.engine.adapt.activations import Passed, passing, texts
from qlab.engine.adapt.init import Weight, recoveries, start
from qlab.engine.models.surgery import module_at
from qlab.engine.quantize.measurements import ModelMeasurements
from qlab.engine.quantize.quantize import chosen, solve
from qlab.nn.linear import weight_of

Storage = tuple[QuantPlan, str]  # a plan, and the solver that fills it
Found = dict[str, Recovery | None]


class Survey:
    """Recoveries of one model.

    Args:
        measured: of the model before it is quantized.
        tokenizer: mlx-lm's wrapper.
        text: for starts that need one; see ``engine.data.text.read_text``.
    """

    def __init__(self, measured: ModelMeasurements, tokenizer: Any, text: Any) -> None:
        self._measurements = measured
        self._tokenizer = tokenizer
        self._text = text
        self._found: dict[Any, Found] = {}
        self._last: Any = None

    def found(self, storage: Any) -> tuple[Found, bool]:
        """Return what was measured by path, and whether it belongs to a storage measured earlier."""
        if self._found.get(storage):
            self._last = storage
            return dict(self._found[storage]), False
        return dict(self._found.get(self._last, {})), self._last is not None

    def measure(
        self, storage: Storage, lora: LoRAConfig, outputs: bool
    ) -> Generator[Progress, None, None]:
        """Measure what each rank recovers in the layers that an adapter changes.

        What is known is not measured again.

        Args:
            storage: of the weights.
            lora: the adapter.
            outputs: whether also on the layers' outputs, for which two texts pass the model.
        """
        plan, solver = storage
        if registry.get("solvers", solver).needs_inputs and self._measurements.calibration is None:
            yield from self._measurements.predict(self._text)
        configs = chosen(self._measurements.spec, plan)
        power = self._measurements.input_power()

        def stored(path: str) -> mx.array:
            weight = self._original(path)
            if (config := configs.get(path)) is None:
                return weight
            return config.scheme.dequantize(
                solve(weight, config, solver, power.get(path)), config, mx.float32
            )

        layers = lora.targets(self._measurements.spec)
        into = self._found.setdefault(storage, {})
        known = all(
            layer.path in into and (into[layer.path] is None or into[layer.path].output)
            for layer in layers
        )
        groups = (
            self._groups([layer.path for layer in layers]) if outputs and not known else iter(())
        )
        yield from recoveries(layers, self._original, stored, groups, into)

    def compensate(
        self, base: nn.Module, lora: LoRAConfig
    ) -> Generator[Progress, None, dict[str, mx.array]]:
        """Return the parameters of adapters that make up for what quantizing did to the model.

        Args:
            base: the quantized model.
            lora: the adapter.
        """
        layers = lora.targets(self._measurements.spec)
        groups = (
            self._groups([layer.path for layer in layers]) if lora.init != "residual" else iter(())
        )
        found = yield from start(
            lora, layers, self._original, lambda path: weight_of(module_at(base, path)), groups
        )
        return found

    @property
    def _original(self) -> Weight:
        return lambda path: weight_of(module_at(self._measurements.module, path))

    def _groups(self, paths: list[str]) -> Iterator[dict[str, Passed]]:
        seen, heldout = texts(self._tokenizer, self._text, self._measurements.spec.vocabulary)
        yield from passing(self._measurements.full_model(), paths, seen, heldout)
