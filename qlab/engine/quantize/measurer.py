"""Fills the error table of one model: sampled, exact, and predicted ΔKL, piece by piece.

One ``Measurer`` belongs to one model, so two panels on it share what was measured. Its methods are
generators that run on the MLX thread; what they have filled stays when they are stopped. Knows no
plan and no panel.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable

import mlx.core as mx
import numpy as np

from qlab import registry
from qlab.core.config.quant import QuantConfig
from qlab.core.config.spec import LayerSpec
from qlab.core.progress import Progress
from qlab.core.quantize.sampling import ratio_estimate, relative_error
from qlab.core.quantize.table import MEASURES, ErrorTable
from qlab.engine.quantize import sample_bank as bank
from qlab.engine.quantize.fisher import Calibration
from qlab.engine.quantize.moments import LayerMoments, moments, weighted_ranges

Events = Generator[Progress, None, None]


def all_configs() -> tuple[QuantConfig, ...]:
    """Every legal config of every scheme on the shelf: the rows of the table, all slider positions."""
    return tuple(
        QuantConfig(scheme.name, bits, group)
        for scheme in registry.shelf("schemes").values()
        for bits in scheme.bits
        for group in scheme.group_sizes
    )


class Measurer:
    """Measurements of one model's weights under every config.

    Args:
        layers: the model's layers.
        weight_of: returns a layer's weight by path, ``(…, out, in)``.

    Attributes:
        table: filled in place; give away ``table.snapshot()``.
        calibration: importance of the weights, or None before a calibration.
    """

    def __init__(self, layers: tuple[LayerSpec, ...], weight_of: Callable[[str], mx.array]) -> None:
        self.layers = layers
        self._weight_of = weight_of
        self.table = ErrorTable.empty(layers, all_configs())
        self.calibration: Calibration | None = None
        self._stacks: list[bank.Stack] = []
        self._moments: dict[int, LayerMoments] = {}
        self._weighted: dict[int, dict[int, float]] = {}

    def sample(self, first: QuantConfig) -> Events:
        """Fill the whole table from the sample bank.

        The config ``first`` comes first, so that it can be shown at once.

        Before the one pass over all weights has ended, errors are relative to the sample;
        afterwards the sum of squared group ranges of the whole layer is the covariate
        (``core.quantize.sampling``).

        Raises:
            WeightsError: a layer holds NaN or infinity.
        """
        if not self._stacks:
            self._stacks = bank.gather(self.layers, self._weight_of)
        if not self._done(first):
            self._fill(first)
            yield Progress("first look", 1, 1)
        # another job may have done a part since this one began, so each part is looked at again
        # when its turn comes
        columns = [i for i, layer in enumerate(self.layers) if not layer.obstacle]
        refined = all(column in self._moments for column in columns)
        for n, column in enumerate(columns):
            if column not in self._moments:
                self._moments[column] = moments(
                    self.layers[column], self._weight_of(self.layers[column].path)
                )
                self.table.kurtosis[column] = self._moments[column].kurtosis
                yield Progress("reading the weights", n + 1, len(columns))
        for n, config in enumerate(_nearest_first(self.table.configs, first)):
            if not self._done(config) or (config == first and not refined):
                self._fill(config)
                yield Progress("trying every scheme", n + 1, len(self.table.configs))

    def exact(self, configs: Iterable[QuantConfig | None]) -> Events:
        """Quantize all weights: one config for each layer, None to leave a layer out."""
        todo = [
            (column, config)
            for column, config in enumerate(configs)
            if config is not None
            and self.table.legal[self.table.row(config), column]
            and not self.table.exact[self.table.row(config), column]
        ]
        for n, (column, config) in enumerate(todo):
            self._fill_exact(column, config)
            yield Progress("measuring exactly", n + 1, len(todo))

    def predict(self, calibration: Calibration) -> Events:
        """Turn every known error into predicted ΔKL, with the importance that a calibration found."""
        self.calibration = calibration
        self.table.values[MEASURES.index("kl_nats") :] = np.nan
        self.table.exact[:] = False
        pairs = {
            i: calibration.pairs[x.path]
            for i, x in enumerate(self.layers)
            if x.path in calibration.pairs
        }
        for n, column in enumerate(pairs):
            self._weighted[column] = weighted_ranges(
                self._weight_of(self.layers[column].path), pairs[column]
            )
            yield Progress("weighing the layers", n + 1, len(pairs))
        for stack in self._stacks:
            stack.weigh(pairs)
        for n, config in enumerate(self.table.configs):
            self._fill(config)
            yield Progress("predicting ΔKL of every scheme", n + 1, len(self.table.configs))

    def _done(self, config: QuantConfig) -> bool:
        row = self.table.row(config)
        known = ~np.isnan(self.table.measure("relative_error")[row])
        return bool((known | ~self.table.legal[row]).all())

    def _fill(self, config: QuantConfig) -> None:
        row = self.table.row(config)
        for stack in self._stacks:
            if stack.width % config.group_size:
                continue
            amax = [self._moments[c].amax if c in self._moments else np.nan for c in stack.columns]
            self._store(row, stack, bank.evaluate(stack, config, np.array(amax)), config)

    def _store(
        self, row: int, stack: bank.Stack, found: bank.ChunkErrors, config: QuantConfig
    ) -> None:
        open_ = ~self.table.exact[row, stack.columns]
        columns = stack.columns[open_]
        value, se, largest = self._relative(stack, found, config)
        for name, values in (
            ("relative_error", value),
            ("relative_error_se", se),
            ("max_abs_error", largest),
        ):
            self.table.measure(name)[row, columns] = values[open_]
        if found.weighted is not None:
            kl, kl_se = self._nats(stack, found, config)
            self.table.measure("kl_nats")[row, columns] = kl[open_]
            self.table.measure("kl_nats_se")[row, columns] = kl_se[open_]

    def _relative(
        self, stack: bank.Stack, found: bank.ChunkErrors, config: QuantConfig
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if all(c in self._moments for c in stack.columns):
            group = max(config.group_size, 32)
            x = stack.spans(group)
            known = [self._moments[c] for c in stack.columns]
            x_total = np.array([m.squared_ranges[group] for m in known])
            weight_sq = np.array([m.sum_sq for m in known])
        else:
            x = stack.energy
            x_total = weight_sq = x.sum(1) * stack.population / x.shape[1]
        return (
            *relative_error(
                *ratio_estimate(found.squared, x, x_total, stack.population), weight_sq
            ),
            found.largest,
        )

    def _nats(
        self, stack: bank.Stack, found: bank.ChunkErrors, config: QuantConfig
    ) -> tuple[np.ndarray, np.ndarray]:
        group = max(config.group_size, 32)
        x_total = np.array([self._weighted.get(c, {}).get(group, np.nan) for c in stack.columns])
        total, se = ratio_estimate(
            found.weighted, stack.weighted_spans(group), x_total, stack.population
        )
        return total / 2, se / 2

    def _fill_exact(self, column: int, config: QuantConfig) -> None:
        layer = self.layers[column]
        row = self.table.row(config)
        weight = self._weight_of(layer.path)
        stored = config.scheme.dequantize(
            config.scheme.quantize(weight, config), config, mx.float32
        )
        error = stored - weight.astype(mx.float32)
        squared = mx.square(error)
        sums = mx.stack(
            [squared.sum(), mx.square(weight.astype(mx.float32)).sum(), mx.abs(error).max()]
        )
        error_sq, weight_sq, largest = np.array(sums, np.float64)
        self.table.exact[row, column] = True
        self.table.measure("relative_error")[row, column] = (
            np.sqrt(error_sq / weight_sq) if weight_sq else 0.0
        )
        self.table.measure("relative_error_se")[row, column] = 0.0
        self.table.measure("max_abs_error")[row, column] = largest
        pairs = self.calibration.pairs.get(layer.path) if self.calibration else None
        if pairs:
            nats = sum((mx.array(r) @ squared @ mx.array(c)).item() for r, c in pairs) / 2
            self.table.measure("kl_nats")[row, column] = nats
            self.table.measure("kl_nats_se")[row, column] = 0.0


def _nearest_first(configs: tuple[QuantConfig, ...], first: QuantConfig) -> list[QuantConfig]:
    """Order configs by how soon a slider can reach them from the first."""

    def distance(config: QuantConfig) -> tuple:
        return (
            config.mode != first.mode,
            abs(config.bits - first.bits),
            abs(config.group_size - first.group_size),
        )

    return sorted(configs, key=distance)
