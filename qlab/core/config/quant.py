"""What a storage format must declare and do. The formats themselves are files in ``schemes/``.

Knows no model and no format; arrays are whatever the scheme computes with (MLX arrays).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import Any

from qlab import registry
from qlab.errors import ConfigError, named

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
            weight: ``(…, out, in)``, float32, bfloat16 or float16; ``in`` is a multiple of the
                group size.
            config: bits and group size.

        Returns:
            The arrays to store, by parameter name (``weight``, ``scales``, …).
        """

    @abstractmethod
    def dequantize(self, packed: dict[str, Any], config: QuantConfig, dtype: Any) -> Any:
        """Return the weight ``(…, out, in)`` that the packed arrays stand for, in ``dtype``."""

    def take(self, packed: dict[str, Any], rows: Any) -> dict[str, Any]:
        """Return packed arrays that stand for some rows of the weight, ``rows`` being integers of
        any shape.
        """
        return {name: array[rows] if array.ndim > 1 else array for name, array in packed.items()}

    def roundtrip(self, rows: Any, config: QuantConfig, amax: Any = None) -> Any:
        """Quantize and dequantize rows that are a *sample* of larger tensors.

        Args:
            rows: ``(n, width)`` in the weight's own dtype.
            config: bits and group size.
            amax: ``(n, 1)`` float32, the largest magnitude of the tensor that each row was taken
                from; rows of one tensor stand together. Only formats with a number for the whole
                tensor need it.

        Returns:
            float32 ``(n, width)``: the values that the format would store.
        """
        import mlx.core as mx

        return self.dequantize(self.quantize(rows, config), config, mx.float32)

    def bits_per_weight(
        self, shape: tuple[int, ...], config: QuantConfig, itemsize: int = 2
    ) -> float:
        """Stored bits per weight, scales and all, for a weight of this shape."""
        return 8 * self.nbytes(shape, config, itemsize) / prod(shape)


@named
@dataclass(frozen=True)
class QuantConfig:
    """Storage of one weight.

    Args:
        mode: name of a scheme on the shelf.
        bits: bits per code; None takes the scheme's default.
        group_size: weights that share a scale; None takes the scheme's default.

    Raises:
        ConfigError: unknown mode, or bits or group size that the scheme does not have.
    """

    mode: str = "affine"
    # None only on the way in: __post_init__ puts the default
    bits: int = None  # pyright: ignore[reportAssignmentType]
    group_size: int = None  # pyright: ignore[reportAssignmentType]

    def __post_init__(self) -> None:
        scheme = self.scheme
        object.__setattr__(
            self, "bits", _legal("bits", self.bits, scheme.bits, scheme.default_bits, scheme)
        )
        object.__setattr__(
            self,
            "group_size",
            _legal(
                "group_size", self.group_size, scheme.group_sizes, scheme.default_group_size, scheme
            ),
        )

    @property
    def scheme(self) -> Scheme:
        """The scheme on the shelf that this config names."""
        return registry.get("schemes", self.mode)

    @property
    def label(self) -> str:
        """Short name for tables and charts, such as ``affine 4-bit g64``."""
        return f"{self.mode} {self.bits}-bit g{self.group_size}"


def _legal(
    word: str, value: int | None, legal: tuple[int, ...], default: int, scheme: Scheme
) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value not in legal:
        hint = ""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            hint = f" The nearest is {min(legal, key=lambda x: abs(x - value))}."
        raise ConfigError(
            f"{word}={value!r} is not legal for mode {scheme.name!r}; it has {', '.join(map(str, legal))}.{hint}"
        )
    return value


def stock_config(mode: str, bits: int, group_size: int) -> QuantConfig:
    """Return the config of what mlx-lm calls a mode (its nvfp4 has no scale of the tensor).

    Raises:
        ConfigError: no scheme reads that mode.
    """
    names = [s.name for s in registry.shelf("schemes").values() if s.stock_mode == mode]
    return QuantConfig(mode if mode in names else next(iter(names), mode), bits, group_size)


@named
@dataclass(frozen=True)
class QuantPlan:
    """Storage of every layer of a model.

    Args:
        default: for each quantizable layer that has no override.
        overrides: by layer path; None keeps that layer at its own precision.
    """

    default: QuantConfig = field(default_factory=lambda: QuantConfig())
    overrides: Mapping[str, QuantConfig | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for path, config in self.overrides.items():
            if config is not None and not isinstance(config, QuantConfig):
                raise ConfigError(
                    f"overrides[{path!r}]={config!r} is not legal; it is a QuantConfig, or None."
                )
        object.__setattr__(
            self, "overrides", MappingProxyType(dict(sorted(self.overrides.items())))
        )

    def config_for(self, path: str) -> QuantConfig | None:
        """Return the config of a layer, or None where it stays at its own precision."""
        return self.overrides.get(path, self.default)

    def with_override(self, path: str, config: QuantConfig | None) -> QuantPlan:
        """Return the same plan with one override more; an override equal to the default is dropped."""
        overrides = {k: v for k, v in self.overrides.items() if k != path}
        if config != self.default:
            overrides[path] = config
        return QuantPlan(self.default, overrides)

    @property
    def label(self) -> str:
        """Short name, such as ``affine 4-bit g64`` or ``affine 4-bit g64 (2 layers otherwise)``."""
        count = len(self.overrides)
        return self.default.label + (
            f" ({count} layer{'s' * (count > 1)} otherwise)" if count else ""
        )

    def __hash__(self) -> int:
        return hash((self.default, tuple(self.overrides.items())))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantPlan):
            return NotImplemented
        return self.default == other.default and dict(self.overrides) == dict(other.overrides)

    def __repr__(self) -> str:
        return f"QuantPlan(default={self.default!r}, overrides={dict(self.overrides)!r})"
