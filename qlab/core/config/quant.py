"""Storage formats and which layer has which: ``Scheme``, ``QuantConfig``, ``QuantPlan``.

A scheme is a class in a file of ``schemes/`` (or in a notebook cell); a config names one and its
settings, a plan gives every layer of a model a config. The engine quantizes and estimates by them.
Knows no model and no format; arrays are whatever a scheme computes with (MLX arrays).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import Any

from qlab import registry
from qlab.core.config.legal import is_number, is_whole
from qlab.errors import ConfigError, reject_unknown_arguments

_ITEMSIZES = {
    "bool_": 1,
    "int8": 1,
    "uint8": 1,
    "int16": 2,
    "uint16": 2,
    "float16": 2,
    "bfloat16": 2,
    "int32": 4,
    "uint32": 4,
    "float32": 4,
    "int64": 8,
    "uint64": 8,
}
Shape = tuple[int, ...]
Layout = dict[str, tuple[Shape, str]]
"""Shape and dtype name of every stored array, by parameter name."""
PackedArrays = dict[str, Any]
"""The stored arrays of a weight, by parameter name."""


class Scheme(ABC):
    """How the weights of a layer are stored: the format, its settings, and both conversions.

    A scheme is used everywhere by its ``name``: in menus, measurements, quantized models, memory
    estimates, training, and saved folders. One instance stands on the shelf for each mode.

    Example:
        Signed bytes with one scale for each row of a group, in a notebook cell::

            import mlx.core as mx
            import qlab
            from qlab.core.config.quant import Scheme

            class Bytes(Scheme):
                name = "bytes"
                title = "signed bytes, float16 scale per group"
                bits = (8,)
                group_sizes = (32, 64)
                default_bits = 8
                default_group_size = 64
                stock_mode = None  # mlx-lm has no such format: saved in qlab's own layout

                def layout(self, shape, config, dtype):
                    *rows, width = shape
                    groups = (*rows, width // config.group_size)
                    return {"weight": (shape, "int8"), "scales": (groups, "float16")}

                def quantize(self, weight, config):
                    groups = weight.reshape(*weight.shape[:-1], -1, config.group_size)
                    scales = (mx.abs(groups).max(-1) / 127).astype(mx.float16)
                    divisor = mx.where(scales == 0, 1, scales)[..., None]
                    codes = mx.clip(mx.round(groups / divisor), -127, 127)
                    return {"weight": codes.astype(mx.int8).reshape(weight.shape), "scales": scales}

                def dequantize(self, packed, config, dtype):
                    codes = packed["weight"]
                    groups = codes.astype(dtype).reshape(*codes.shape[:-1], -1, config.group_size)
                    return (groups * packed["scales"].astype(dtype)[..., None]).reshape(codes.shape)

            qlab.register("schemes", Bytes())
            qlab.QuantConfig("bytes")  # → QuantConfig(mode='bytes', bits=8, group_size=64)

    Attributes:
        name: the ``mode`` that a user types.
        title: one line that says what the format is, shown beside the menu.
        bits: legal bits per stored code, ascending.
        group_sizes: legal numbers of weights that share a scale, ascending.
        default_bits: bits taken when a user names only the mode.
        default_group_size: group size taken when a user names only the mode.
        stock_mode: mode under which stock mlx-lm reads the packed arrays, or None if it cannot.
        unreadable_on: MLX back ends (``"cpu"``, ``"cuda"``, ``"metal"``) on which the operations of
            ``dequantize`` cannot be exported as a graph; there memory estimates read
            ``dequantize_readable`` instead.
    """

    name: str
    title: str
    bits: tuple[int, ...]
    group_sizes: tuple[int, ...]
    default_bits: int
    default_group_size: int
    stock_mode: str | None
    unreadable_on: tuple[str, ...] = ()

    @abstractmethod
    def layout(self, shape: Shape, config: QuantConfig, dtype: str) -> Layout:
        """Shape and dtype of every array that ``quantize`` returns, by parameter name.

        Args:
            shape: of the weight, ``(…, out, in)``.
            config: bits and group size.
            dtype: name of the weight's dtype, such as ``"bfloat16"``.
        """

    def nbytes(self, shape: Shape, config: QuantConfig, itemsize: int) -> int:
        """Exact bytes of a packed weight.

        Args:
            shape: of the weight, ``(…, out, in)``.
            config: bits and group size.
            itemsize: bytes of one element of the unquantized weight (its scales take that dtype).
        """
        arrays = self.layout(shape, config, "float32" if itemsize == 4 else "bfloat16")
        return sum(prod(shape) * _ITEMSIZES[dtype] for shape, dtype in arrays.values())

    @abstractmethod
    def quantize(self, weight: Any, config: QuantConfig) -> PackedArrays:
        """Pack a weight by rounding to nearest.

        Args:
            weight: ``(…, out, in)``, float32, bfloat16 or float16; ``in`` is a multiple of the
                group size.
            config: bits and group size.

        Returns:
            The arrays to store, by parameter name (``weight``, ``scales``, …).
        """

    @abstractmethod
    def dequantize(self, packed: PackedArrays, config: QuantConfig, dtype: Any) -> Any:
        """Return the weight that packed arrays stand for.

        Args:
            packed: arrays as ``quantize`` or ``take`` returned them.
            config: bits and group size.
            dtype: MLX dtype of the result; computed in it, or more exactly.

        Returns:
            ``(…, out, in)``.
        """

    def dequantize_readable(self, packed: PackedArrays, config: QuantConfig, dtype: Any) -> Any:
        """Return an array as ``dequantize`` does, by operations that can be exported as a graph.

        Called instead of ``dequantize`` when a step is read to estimate its memory on a back end of
        ``unreadable_on``. Only the sizes of the arrays on the way matter: the values may be wrong.

        Args:
            packed: arrays as ``layout`` has them.
            config: bits and group size.
            dtype: MLX dtype of the result.
        """
        return self.dequantize(packed, config, dtype)

    def take(self, packed: PackedArrays, rows: Any) -> PackedArrays:
        """Return packed arrays that stand for some rows of the weight (an embedding's look-up).

        Args:
            packed: arrays as ``quantize`` returned them, of a weight ``(out, in)``.
            rows: integers of any shape.
        """
        return {name: array[rows] if array.ndim > 1 else array for name, array in packed.items()}

    def roundtrip(self, rows: Any, config: QuantConfig, dtype: Any, amax: Any = None) -> Any:
        """Quantize and dequantize rows that are a *sample* of larger tensors.

        Args:
            rows: ``(n, width)`` in the weight's own dtype.
            config: bits and group size.
            dtype: MLX dtype of the result.
            amax: ``(n, 1)`` float32, the largest magnitude of the tensor that each row was taken
                from; rows of one tensor stand together. Only formats with a number for the whole
                tensor need it.

        Returns:
            ``(n, width)``: the values that the format would store.
        """
        return self.dequantize(self.quantize(rows, config), config, dtype)

    def bits_per_weight(self, shape: Shape, config: QuantConfig, itemsize: int = 2) -> float:
        """Stored bits per weight, scales and all, for a weight of this shape."""
        return 8 * self.nbytes(shape, config, itemsize) / prod(shape)


@reject_unknown_arguments
@dataclass(frozen=True)
class QuantConfig:
    """Storage of one weight: a scheme, the bits of a code and the size of a group.

    Example:
        >>> qlab.QuantConfig("affine", bits=3)
        QuantConfig(mode='affine', bits=3, group_size=64)
        >>> qlab.QuantConfig("mxfp4").label
        'mxfp4 4-bit g32'

    Args:
        mode: name of a scheme on the shelf; ``scheme`` is the object.
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
        bits = scheme.default_bits if self.bits is None else self.bits
        size = scheme.default_group_size if self.group_size is None else self.group_size
        _check_legal("bits", bits, scheme.bits, scheme)
        _check_legal("group_size", size, scheme.group_sizes, scheme)
        object.__setattr__(self, "bits", bits)
        object.__setattr__(self, "group_size", size)

    @property
    def scheme(self) -> Scheme:
        """The scheme on the shelf that this config names."""
        return registry.get("schemes", self.mode)

    @property
    def label(self) -> str:
        """Short name for tables and charts, such as ``affine 4-bit g64``."""
        return f"{self.mode} {self.bits}-bit g{self.group_size}"


def _check_legal(name: str, value: Any, legal: tuple[int, ...], scheme: Scheme) -> None:
    if is_whole(value) and value in legal:
        return
    hint = ""
    if is_number(value):
        closest = min(legal, key=lambda x: abs(x - value))
        hint = f" The nearest is {closest}."
    raise ConfigError(
        f"{name}={value!r} is not legal for mode {scheme.name!r}; "
        f"it has {', '.join(map(str, legal))}.{hint}"
    )


def stock_config(mode: str, bits: int, group_size: int) -> QuantConfig:
    """Return the config of a mode of stock mlx-lm.

    Modes have the same names here, but for mlx-lm's ``nvfp4``, which has no scale of the tensor.

    Raises:
        ConfigError: no scheme reads that mode.
    """
    schemes = registry.shelf("schemes").values()
    names = [scheme.name for scheme in schemes if scheme.stock_mode == mode]
    if names and mode not in names:
        return QuantConfig(names[0], bits, group_size)
    return QuantConfig(mode, bits, group_size)


@reject_unknown_arguments
@dataclass(frozen=True)
class QuantPlan:
    """Storage of every layer of a model: one config, and layers that differ from it.

    Example:
        >>> eight = qlab.QuantConfig("affine", bits=8)
        >>> plan = qlab.QuantPlan(qlab.QuantConfig("mxfp4"), {"lm_head": eight})
        >>> plan.config_for("lm_head").bits
        8

    Args:
        default: for each quantizable layer that has no override.
        overrides: by layer path; None keeps that layer at its present precision.

    Raises:
        ConfigError: an override is neither a config nor None.
    """

    default: QuantConfig = field(default_factory=lambda: QuantConfig())
    overrides: Mapping[str, QuantConfig | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for path, config in self.overrides.items():
            if config is not None and not isinstance(config, QuantConfig):
                raise ConfigError(
                    f"overrides[{path!r}]={config!r} is not legal; it is a QuantConfig, or None."
                )
        in_order = dict(sorted(self.overrides.items()))
        object.__setattr__(self, "overrides", MappingProxyType(in_order))

    def config_for(self, path: str) -> QuantConfig | None:
        """Return the config of a layer, or None where it stays at its present precision."""
        return self.overrides.get(path, self.default)

    def with_override(self, path: str, config: QuantConfig | None) -> QuantPlan:
        """Return the same plan with one more override; one equal to the default is dropped."""
        overrides = dict(self.overrides)
        overrides.pop(path, None)
        if config != self.default:
            overrides[path] = config
        return QuantPlan(self.default, overrides)

    @property
    def label(self) -> str:
        """Short name, such as ``affine 4-bit g64`` or ``affine 4-bit g64 (2 layers otherwise)``."""
        count = len(self.overrides)
        if not count:
            return self.default.label
        layers = "layer" if count == 1 else "layers"
        return f"{self.default.label} ({count} {layers} otherwise)"

    def __reduce__(self) -> tuple[type[QuantPlan], tuple[QuantConfig, dict]]:
        # a mapping proxy can neither be pickled nor copied
        return QuantPlan, (self.default, dict(self.overrides))

    def __hash__(self) -> int:
        return hash((self.default, tuple(self.overrides.items())))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantPlan):
            return NotImplemented
        return self.default == other.default and dict(self.overrides) == dict(other.overrides)

    def __repr__(self) -> str:
        return f"QuantPlan(default={self.default!r}, overrides={dict(self.overrides)!r})"
