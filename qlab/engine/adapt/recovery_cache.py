"""What adapters can recover of a model's quantization error, remembered by storage.

Joins a model's weights, its storage and what passes through it; an adapter of ``qlab.lab`` asks it.
Its methods are generators for the MLX thread.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qlab import registry
from qlab.core.adapt.recovery import Recovery
from qlab.core.config.lora import LoRAConfig
from qlab.core.config.quant import QuantPlan
from qlab.core.config.spec import LayerSpec
from qlab.core.progress import Progress
from qlab.engine.adapt.activations import LayerInputs, passing, texts
from qlab.engine.adapt.directions import WeightOf
from qlab.engine.adapt.init import start
from qlab.engine.adapt.recovery import recoveries
from qlab.engine.models.surgery import module_at
from qlab.engine.quantize.measurements import ModelMeasurements
from qlab.engine.quantize.quantize import chosen, solve
from qlab.nn.linear import weight_of

Storage = tuple[QuantPlan, str]  # a plan, and the solver that fills it
Recoveries = dict[str, Recovery | None]  # by path; None where there is no error


class RecoveryCache:
    """Recoveries of one model, by storage.

    Args:
        measurements: of the model before it is quantized.
        tokenizer: mlx-lm's wrapper.
        text: for initializations that need one; see ``engine.data.text.read_text``.
    """

    def __init__(self, measurements: ModelMeasurements, tokenizer: Any, text: Any) -> None:
        self._measurements = measurements
        self._tokenizer = tokenizer
        self._text = text
        self._by_storage: dict[Any, Recoveries] = {}
        self._last: Any = None  # storage that was asked for last, of those measured

    def latest(self, storage: Any) -> tuple[Recoveries, bool]:
        """Return recoveries by path, and whether they belong to a storage measured earlier."""
        present = self._by_storage.get(storage)
        if present:
            self._last = storage
            return dict(present), False
        earlier = self._by_storage.get(self._last, {})
        is_earlier = self._last is not None
        return dict(earlier), is_earlier

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
        measurements = self._measurements
        needs_inputs = registry.get("solvers", solver).needs_inputs
        if needs_inputs and measurements.calibration is None:
            yield from measurements.predict(self._text)
        layers = lora.targets(measurements.spec)
        into = self._by_storage.setdefault(storage, {})
        groups: Iterable[dict[str, LayerInputs]] = ()
        all_known = all(_is_known(layer.path, into) for layer in layers)
        if outputs and not all_known:
            groups = self._inputs(layers)
        stored = self._stored(plan, solver)
        yield from recoveries(layers, self._original, stored, groups, into)

    def compensate(
        self, base: nn.Module, lora: LoRAConfig
    ) -> Generator[Progress, None, dict[str, mx.array]]:
        """Return parameters of adapters that compensate for the quantization error of a model.

        Args:
            base: the quantized model.
            lora: the adapter, with its initialization.
        """
        layers = lora.targets(self._measurements.spec)
        groups: Iterable[dict[str, LayerInputs]] = ()
        if lora.init != "residual":
            groups = self._inputs(layers)

        def stored(path: str) -> mx.array:
            layer = module_at(base, path)
            return weight_of(layer)

        arrays = yield from start(lora, layers, self._original, stored, groups)
        return arrays

    def _original(self, path: str) -> mx.array:
        layer = module_at(self._measurements.module, path)
        return weight_of(layer)

    def _stored(self, plan: QuantPlan, solver: str) -> WeightOf:
        """Return a function that gives the dequantized weight of a layer under a plan."""
        configs = chosen(self._measurements.spec, plan)
        power = self._measurements.input_power()

        def stored(path: str) -> mx.array:
            weight = self._original(path)
            config = configs.get(path)
            if config is None:
                return weight
            of_layer = power.get(path)
            packed = solve(weight, config, solver, of_layer)
            scheme = config.scheme
            return scheme.dequantize(packed, config, mx.float32)

        return stored

    def _inputs(self, layers: Iterable[LayerSpec]) -> Iterator[dict[str, LayerInputs]]:
        vocabulary = self._measurements.spec.vocabulary
        seen, heldout = texts(self._tokenizer, self._text, vocabulary)
        paths = [layer.path for layer in layers]
        model = self._measurements.full_model()
        yield from passing(model, paths, seen, heldout)


def _is_known(path: str, recoveries: Recoveries) -> bool:
    """Whether a layer has been measured on a text, or has no error."""
    if path not in recoveries:
        return False
    known = recoveries[path]
    return known is None or bool(known.output)
