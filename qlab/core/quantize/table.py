"""The table behind the sliders.

Every storage config × every layer, so that a slider position is a row.

Pure numpy. Filled by the engine piece by piece; NaN means not measured yet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from qlab.core.config.quant import QuantConfig
from qlab.core.config.spec import LayerSpec

MEASURES = ("relative_error", "relative_error_se", "max_abs_error", "kl_nats", "kl_nats_se")


@dataclass(frozen=True, eq=False)
class ErrorTable:
    """Errors and sizes of every config (rows, S) for every layer (columns, L).

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
        s = len(configs)
        n = len(layers)
        legal = np.array(
            [[layer.refusal(c) is None for layer in layers] for c in configs], bool
        ).reshape(s, n)
        nbytes = np.array(
            [[layer.nbytes_as(c) for layer in layers] for c in configs], np.float64
        ).reshape(s, n)
        values = np.full((len(MEASURES), s, n), np.nan, np.float32)
        return cls(
            layers,
            configs,
            nbytes,
            legal,
            values,
            np.zeros((s, n), bool),
            np.full(n, np.nan, np.float32),
        )

    def measure(self, name: str) -> np.ndarray:
        """Return the ``(S, L)`` float32 array of one of ``MEASURES``."""
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
