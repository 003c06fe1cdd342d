"""The table behind the sliders: every storage config × every layer, so a slider position is a row.

Four parts hold what was measured of a model:

- ``ErrorTable`` (here): the numbers, pure numpy; NaN means not measured yet;
- ``engine.quantize.sample_bank.SampleStack``: the random sample of the weights;
- ``engine.quantize.table_filler.TableFiller``: writes into the table, from samples or all weights;
- ``engine.quantize.measurements.ModelMeasurements``: one per model; owns the other three.

Readers (``report_of``, ``compare``, the panel) are given a table, never what fills it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from qlab.core.config.quant import QuantConfig
from qlab.core.config.spec import LayerSpec

KL_MEASURES = ("kl_nats", "kl_nats_se")
MEASURES = ("relative_error", "relative_error_se", "max_abs_error", *KL_MEASURES)


@dataclass(frozen=True, eq=False, kw_only=True)
class ErrorTable:
    """Errors and sizes of every config (rows, S) for every layer (columns, L).

    Example:
        >>> from qlab.core.config.quant import QuantConfig
        >>> from qlab.core.config.spec import LayerSpec
        >>> layer = LayerSpec(path="head", kind="linear", shape=(64, 128))
        >>> configs = (QuantConfig(bits=4), QuantConfig(bits=8))
        >>> table = ErrorTable.empty((layer,), configs)
        >>> table.nbytes.tolist()  # known at once
        [[4608.0], [8704.0]]
        >>> table.row(QuantConfig(bits=8))
        1
        >>> float(table.measure("relative_error")[1, 0])  # until a filler measures it
        nan

    Attributes:
        layers: the columns.
        configs: the rows.
        nbytes: float64 ``(S, L)``, bytes of the weight; its present bytes where the config cannot
            store it.
        legal: bool ``(S, L)``, whether the config can store the layer.
        values: float32 ``(5, S, L)`` in the order of ``MEASURES``: ‖W−Ŵ‖/‖W‖, its standard error (0
            where exact), the largest |W−Ŵ| seen, predicted ΔKL in nats per token, and its standard
            error.
        exact: bool ``(S, L)``, whether the relative error was computed over all weights of the
            layer.
        kurtosis: float32 ``(L,)``, fourth standardized moment of the weights (3 for a Gaussian).
    """

    layers: tuple[LayerSpec, ...]
    configs: tuple[QuantConfig, ...]
    nbytes: np.ndarray
    legal: np.ndarray
    values: np.ndarray
    exact: np.ndarray
    kurtosis: np.ndarray

    @classmethod
    def empty(cls, layers: tuple[LayerSpec, ...], configs: tuple[QuantConfig, ...]) -> ErrorTable:
        """Return a table whose sizes are exact and whose errors are all unknown."""
        shape = (len(configs), len(layers))

        def cells(
            value: Callable[[LayerSpec, QuantConfig], float], dtype: type[np.generic]
        ) -> np.ndarray:
            rows = [[value(layer, config) for layer in layers] for config in configs]
            return np.array(rows, dtype).reshape(shape)

        return cls(
            layers=layers,
            configs=configs,
            nbytes=cells(LayerSpec.nbytes_as, np.float64),
            legal=cells(lambda layer, config: layer.refusal(config) is None, np.bool_),
            values=np.full((len(MEASURES), *shape), np.nan, np.float32),
            exact=np.zeros(shape, np.bool_),
            kurtosis=np.full(len(layers), np.nan, np.float32),
        )

    def measure(self, name: str) -> np.ndarray:
        """Return the ``(S, L)`` float32 array of one of ``MEASURES``, a view into ``values``."""
        return self.values[MEASURES.index(name)]

    def row(self, config: QuantConfig) -> int:
        """Return the row of a config."""
        return self.configs.index(config)

    def snapshot(self) -> ErrorTable:
        """Return a copy that the engine will not write into."""
        return replace(
            self,
            values=self.values.copy(),
            exact=self.exact.copy(),
            kurtosis=self.kurtosis.copy(),
        )
