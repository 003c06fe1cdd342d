"""What a storage format must declare and do. The formats themselves are files in ``schemes/``.

Knows no model and no format; arrays are whatever the scheme computes with (MLX arrays).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlab.core.config import QuantConfig

_ITEMSIZES = {"uint8": 1, "float16": 2, "bfloat16": 2, "uint32": 4, "float32": 4}
Layout = dict[str, tuple[tuple[int, ...], str]]


class Scheme(ABC):
    """How numbers are stored. One instance per mode stands on the shelf.

    Attributes:
        name: the ``mode`` that a user types.
        title: one line that says what the format is, shown beside the menu.
        bits: legal bits per stored code, ascending.
        group_sizes: legal numbers of weights that share a scale, ascending.
        default_bits: bits taken when a user names only the mode.
        default_group_size: group size taken when a user names only the mode.
        stock_mode: mode under which stock mlx-lm reads the packed arrays, or None if it cannot.
    """

    name: str
    title: str
    bits: tuple[int, ...]
    group_sizes: tuple[int, ...]
    default_bits: int
    default_group_size: int
    stock_mode: str | None

    @abstractmethod
    def layout(self, shape: tuple[int, ...], config: QuantConfig, dtype: str) -> Layout:
        """Shape and dtype of every array that ``quantize`` returns, by parameter name.

        Args:
            shape: of the weight, ``(…, out, in)``.
            config: bits and group size.
            dtype: of the weight.
        """

    def nbytes(self, shape: tuple[int, ...], config: QuantConfig, itemsize: int) -> int:
        """Exact bytes of a packed weight.

        Args:
            shape: shape of the weight, ``(…, out, in)``.
            config: bits and group size.
            itemsize: bytes of one element of the unquantized weight (its scales take that dtype).
        """
        arrays = self.layout(shape, config, "float32" if itemsize == 4 else "bfloat16")
        return sum(prod(shape) * _ITEMSIZES[dtype] for shape, dtype in arrays.values())

    @abstractmethod
    def quantize(self, weight: Any, config: QuantConfig) -> dict[str, Any]:
        """Pack a weight by rounding to nearest.

        Args:
            weight: ``(…, out, in)``, float32, bfloat16 or float16; ``in`` is a multiple of the group size.
            config: bits and group size.

        Returns:
            The arrays to store, by parameter name (``weight``, ``scales``, …).
        """

    @abstractmethod
    def dequantize(self, packed: dict[str, Any], config: QuantConfig, dtype: Any) -> Any:
        """Return the weight ``(…, out, in)`` that the packed arrays stand for, in ``dtype``."""

    def take(self, packed: dict[str, Any], rows: Any) -> dict[str, Any]:
        """Return packed arrays that stand for some rows of the weight, ``rows`` being integers of any shape."""
        return {name: array[rows] if array.ndim > 1 else array for name, array in packed.items()}

    def roundtrip(self, rows: Any, config: QuantConfig, amax: Any = None) -> Any:
        """Quantize and dequantize rows that are a *sample* of larger tensors.

        Args:
            rows: ``(n, width)`` in the weight's own dtype.
            config: bits and group size.
            amax: ``(n, 1)`` float32, the largest magnitude of the tensor that each row was taken from; rows of one
                tensor stand together. Only formats with a number for the whole tensor need it.

        Returns:
            float32 ``(n, width)``: the values that the format would store.
        """
        import mlx.core as mx

        return self.dequantize(self.quantize(rows, config), config, mx.float32)

    def bits_per_weight(self, shape: tuple[int, ...], config: QuantConfig, itemsize: int = 2) -> float:
        """Stored bits per weight, scales and all, for a weight of this shape."""
        return 8 * self.nbytes(shape, config, itemsize) / prod(shape)
