"""What to store each layer as: ``QuantConfig`` for one layer, ``QuantPlan`` for a model.

Both are frozen, and ``eval(repr(x)) == x``. Knows which settings are legal by asking the shelf; knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from qlab import registry
from qlab.core.scheme import Scheme
from qlab.errors import ConfigError, named


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
        object.__setattr__(self, "bits", _legal("bits", self.bits, scheme.bits, scheme.default_bits, scheme))
        object.__setattr__(
            self,
            "group_size",
            _legal("group_size", self.group_size, scheme.group_sizes, scheme.default_group_size, scheme),
        )

    @property
    def scheme(self) -> Scheme:
        """The scheme on the shelf that this config names."""
        return registry.get("schemes", self.mode)

    @property
    def label(self) -> str:
        """Short name for tables and charts, such as ``affine 4-bit g64``."""
        return f"{self.mode} {self.bits}-bit g{self.group_size}"


def _legal(word: str, value: int | None, legal: tuple[int, ...], default: int, scheme: Scheme) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value not in legal:
        hint = ""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            hint = f" The nearest is {min(legal, key=lambda x: abs(x - value))}."
        raise ConfigError(f"{word}={value!r} is not legal for mode {scheme.name!r}; it has {', '.join(map(str, legal))}.{hint}")
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
                raise ConfigError(f"overrides[{path!r}]={config!r} is not legal; it is a QuantConfig, or None.")
        object.__setattr__(self, "overrides", MappingProxyType(dict(sorted(self.overrides.items()))))

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
        return self.default.label + (f" ({count} layer{'s' * (count > 1)} otherwise)" if count else "")

    def __hash__(self) -> int:
        return hash((self.default, tuple(self.overrides.items())))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantPlan):
            return NotImplemented
        return self.default == other.default and dict(self.overrides) == dict(other.overrides)

    def __repr__(self) -> str:
        return f"QuantPlan(default={self.default!r}, overrides={dict(self.overrides)!r})"
