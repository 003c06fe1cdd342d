"""Fills the error table of one model: sampled errors, exact ones, and predicted ΔKL.

``ModelMeasurements`` owns the table (``core.quantize.table.ErrorTable``) and hands it to one
``TableFiller``. The filler's methods are generators for the MLX thread that write into the table as
they go, so what they have filled stays when they are stopped, and the next one goes on from there.

Three depths of the same numbers:

- ``sample``: from a sample of every layer, all configs, within seconds (``sample_bank``);
- ``measure_exactly``: from all weights, one config per layer;
- ``predict``: both of these turned into nats, by the importance that a calibration measured.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence

import mlx.core as mx
import numpy as np

from qlab import registry
from qlab.core.config.quant import QuantConfig
from qlab.core.progress import Progress
from qlab.core.quantize.sampling import ratio_estimate, relative_error
from qlab.core.quantize.table import KL_MEASURES, ErrorTable
from qlab.engine.quantize.fisher import Calibration
from qlab.engine.quantize.moments import (
    GROUPS,
    ImportancePairs,
    LayerMoments,
    moments,
    weighted_ranges,
)
from qlab.engine.quantize.sample_bank import (
    ChunkErrors,
    SampleStack,
    draw_samples,
    roundtrip_errors,
)
from qlab.ops.sums import stable_sum

Events = Generator[Progress, None, None]
Arrays = tuple[np.ndarray, np.ndarray]


def all_configs() -> tuple[QuantConfig, ...]:
    """Return every legal config of every scheme: the rows of the table, all slider positions."""
    configs = []
    for scheme in registry.shelf("schemes").values():
        for bits in scheme.bits:
            for group in scheme.group_sizes:
                config = QuantConfig(scheme.name, bits, group)
                configs.append(config)
    return tuple(configs)


class TableFiller:
    """Writes measured numbers into an error table.

    Args:
        table: filled in place.
        weight_of: returns a layer's weight by path, ``(…, out, in)``.

    Attributes:
        calibration: importance of the weights, or None before ``predict``.
    """

    def __init__(self, table: ErrorTable, weight_of: Callable[[str], mx.array]) -> None:
        self.table = table
        self.calibration: Calibration | None = None
        self._weight_of = weight_of
        self._stacks: list[SampleStack] = []
        self._moments: dict[int, LayerMoments] = {}  # by column
        self._weighted_ranges: dict[int, dict[int, float]] = {}  # by column and group size

    def sample(self, first: QuantConfig) -> Events:
        """Fill the whole table from samples; ``first`` is done first, to be shown at once.

        Until all weights have been read once, errors are relative to the sample. Afterwards the sum
        of squared group ranges of the whole layer is the covariate of a ratio estimate
        (``core.quantize.sampling``), and everything is filled again.

        Raises:
            WeightsError: a layer holds NaN or infinity.
        """
        if not self._stacks:
            self._stacks = draw_samples(self.table.layers, self._weight_of)
        if not self._is_filled(first):
            self._fill_from_samples(first)
            yield Progress("first look", 1, 1)
        # Another job may have done a part since this one began, so each part is checked again when
        # its turn comes.
        measurable = self._measurable()
        had_moments = self._has_moments(measurable)
        yield from self._read_moments()
        configs = _nearest_first(self.table.configs, first)
        for done, config in enumerate(configs, 1):
            filled_without_moments = config == first and not had_moments
            if filled_without_moments or not self._is_filled(config):
                self._fill_from_samples(config)
                yield Progress("trying every scheme", done, len(configs))

    def measure_exactly(self, configs: Iterable[QuantConfig | None]) -> Events:
        """Quantize all weights: one config for each layer, None to leave a layer out."""
        todo = []
        for column, config in enumerate(configs):
            if config is None:
                continue
            if self._needs_exact(column, config):
                todo.append((column, config))
        for done, (column, config) in enumerate(todo, 1):
            self._fill_exactly(column, config)
            yield Progress("measuring exactly", done, len(todo))

    def predict(self, calibration: Calibration) -> Events:
        """Turn every known error into predicted ΔKL, by the importance that was calibrated."""
        self.calibration = calibration
        for measure in KL_MEASURES:
            self.table.measure(measure)[:] = np.nan
        self.table.exact[:] = False
        pairs: dict[int, ImportancePairs] = {}
        for column, layer in enumerate(self.table.layers):
            if layer.path in calibration.pairs:
                pairs[column] = calibration.pairs[layer.path]
        for done, column in enumerate(pairs, 1):
            weight = self._weight(column)
            ranges = weighted_ranges(weight, pairs[column])
            self._weighted_ranges[column] = ranges
            yield Progress("weighing the layers", done, len(pairs))
        for stack in self._stacks:
            stack.set_importance(pairs)
        configs = self.table.configs
        for done, config in enumerate(configs, 1):
            self._fill_from_samples(config)
            yield Progress("predicting ΔKL of every scheme", done, len(configs))

    # --- what is known -------------------------------------------------------------------------

    def _weight(self, column: int) -> mx.array:
        layer = self.table.layers[column]
        return self._weight_of(layer.path)

    def _measurable(self) -> list[int]:
        """Columns of the layers that some scheme can store."""
        return [i for i, layer in enumerate(self.table.layers) if not layer.obstacle]

    def _has_moments(self, columns: Iterable[int]) -> bool:
        return all(column in self._moments for column in columns)

    def _is_filled(self, config: QuantConfig) -> bool:
        row = self.table.row(config)
        errors = self.table.measure("relative_error")[row]
        is_known = ~np.isnan(errors)
        is_illegal = ~self.table.legal[row]
        is_done = is_known | is_illegal
        return bool(is_done.all())

    def _needs_exact(self, column: int, config: QuantConfig) -> bool:
        row = self.table.row(config)
        is_legal = self.table.legal[row, column]
        is_exact = self.table.exact[row, column]
        return bool(is_legal and not is_exact)

    def _read_moments(self) -> Events:
        """Read all weights once."""
        columns = self._measurable()
        for done, column in enumerate(columns, 1):
            if column in self._moments:
                continue
            layer = self.table.layers[column]
            layer_moments = moments(layer, self._weight(column))
            self._moments[column] = layer_moments
            self.table.kurtosis[column] = layer_moments.kurtosis
            yield Progress("reading the weights", done, len(columns))

    # --- from samples --------------------------------------------------------------------------

    def _fill_from_samples(self, config: QuantConfig) -> None:
        row = self.table.row(config)
        for stack in self._stacks:
            if stack.width % config.group_size:
                continue
            amax = self._amax(stack.columns)
            errors = roundtrip_errors(stack, config, amax)
            self._write_sampled(row, stack, errors, config)

    def _amax(self, columns: Sequence[int] | np.ndarray) -> np.ndarray:
        """Largest magnitude of each whole layer, ``(L,)``; NaN where it has not been read."""
        amax = []
        for column in columns:
            layer_moments = self._moments.get(column)
            amax.append(np.nan if layer_moments is None else layer_moments.amax)
        return np.array(amax)

    def _write_sampled(
        self, row: int, stack: SampleStack, errors: ChunkErrors, config: QuantConfig
    ) -> None:
        """Write a row of the table for a stack's layers; exact numbers are not overwritten."""
        relative, relative_se = self._relative(stack, errors.squared, config)
        measured = {
            "relative_error": relative,
            "relative_error_se": relative_se,
            "max_abs_error": errors.largest,
        }
        if errors.weighted is not None:
            nats, nats_se = self._nats(stack, errors.weighted, config)
            measured["kl_nats"] = nats
            measured["kl_nats_se"] = nats_se
        is_sampled = ~self.table.exact[row, stack.columns]
        columns = stack.columns[is_sampled]
        for measure, values in measured.items():
            self.table.measure(measure)[row, columns] = values[is_sampled]

    def _relative(self, stack: SampleStack, squared: np.ndarray, config: QuantConfig) -> Arrays:
        """Return ‖W−Ŵ‖/‖W‖ of each layer and its standard error, ``(L,)`` each."""
        if self._has_moments(stack.columns):
            group = _covariate_group(config)
            covariate = stack.spans(group)
            known = [self._moments[column] for column in stack.columns]
            covariate_total = np.array([m.squared_ranges[group] for m in known])
            weight_sq = np.array([m.sum_sq for m in known])
        else:  # the sample's own energy, scaled up to the layer
            covariate = stack.energy
            sampled = covariate.shape[1]
            covariate_total = covariate.sum(1) * stack.population / sampled
            weight_sq = covariate_total
        error_sq, se = ratio_estimate(squared, covariate, covariate_total, stack.population)
        return relative_error(error_sq, se, weight_sq)

    def _nats(self, stack: SampleStack, weighted: np.ndarray, config: QuantConfig) -> Arrays:
        """Return predicted ΔKL of each layer and its standard error, in nats, ``(L,)`` each.

        ΔKL = ½ Σ F·E² (see ``fisher.Calibration``).
        """
        group = _covariate_group(config)
        totals = []
        for column in stack.columns:
            ranges = self._weighted_ranges.get(column, {})
            totals.append(ranges.get(group, np.nan))
        covariate_total = np.array(totals)
        covariate = stack.weighted_spans(group)
        total, se = ratio_estimate(weighted, covariate, covariate_total, stack.population)
        return total / 2, se / 2

    # --- from all weights ----------------------------------------------------------------------

    def _fill_exactly(self, column: int, config: QuantConfig) -> None:
        row = self.table.row(config)
        weight = self._weight(column)  # (…, out, in)
        packed = config.scheme.quantize(weight, config)
        dequantized = config.scheme.dequantize(packed, config, mx.float32)
        full = weight.astype(mx.float32)
        error = dequantized - full
        squared = mx.square(error)
        squared_sum = stable_sum(squared)
        full_sum = stable_sum(full, mx.square)
        largest_error = mx.abs(error).max()
        sums = mx.stack([squared_sum, full_sum, largest_error])
        error_sq, weight_sq, largest = np.array(sums, np.float64)
        relative = np.sqrt(error_sq / weight_sq) if weight_sq else 0.0
        self.table.exact[row, column] = True
        self.table.measure("relative_error")[row, column] = relative
        self.table.measure("relative_error_se")[row, column] = 0.0
        self.table.measure("max_abs_error")[row, column] = largest
        pairs = self._importance(column)
        if pairs:
            # Σ_oi r[o]·E²[o,i]·c[i] of each pair; layers with pairs are matrices
            terms = []
            for r, c in pairs:
                of_rows = np.array(squared @ mx.array(c), np.float64)
                terms.append(r @ of_rows)
            self.table.measure("kl_nats")[row, column] = sum(terms) / 2
            self.table.measure("kl_nats_se")[row, column] = 0.0

    def _importance(self, column: int) -> ImportancePairs:
        if self.calibration is None:
            return ()
        layer = self.table.layers[column]
        return self.calibration.pairs.get(layer.path, ())


def _covariate_group(config: QuantConfig) -> int:
    """Group size whose squared ranges stand for a config's: the smallest that is read is 32."""
    return max(config.group_size, min(GROUPS))


def _nearest_first(configs: Sequence[QuantConfig], first: QuantConfig) -> list[QuantConfig]:
    """Order configs by how soon a slider can reach them from the first."""

    def distance(config: QuantConfig) -> tuple[bool, int, int]:
        is_other_mode = config.mode != first.mode
        bits = abs(config.bits - first.bits)
        group = abs(config.group_size - first.group_size)
        return is_other_mode, bits, group

    return sorted(configs, key=distance)
