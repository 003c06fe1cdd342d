"""Adapters: what a user may ask for (``LoRAConfig``) and what a kind must do (``AdapterKind``).

The kinds themselves are files in ``adapters/``. The engine asks a kind for everything that depends
on it, so a kind registered in a notebook cell works everywhere. Knows no array library.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from math import prod, sqrt
from typing import Any

from qlab import registry
from qlab.core.config.legal import check_choice, check_flag, check_number, check_whole, is_whole
from qlab.core.config.spec import LayerSpec, ModelSpec
from qlab.deprecated import deprecated_name, positional_settings
from qlab.errors import (
    ConfigError,
    LayerNotFoundError,
    UnsupportedError,
    nearest,
    reject_unknown_arguments,
)

Shapes = dict[str, tuple[int, ...]]


class AdapterKind(ABC):
    """A small trainable change of a frozen layer. One instance per kind stands on the shelf.

    A subclass must declare the shapes of its arrays and make a module. With ``change`` it can be
    fused and previewed too; with ``compensated`` it has the error-compensating initializations.

    Example:
        >>> class Gain(qlab.AdapterKind):  # y = (1 + gain) · base(x)
        ...     name, title = "gain", "a gain for every output"
        ...     def shapes(self, shape, rank, kind="linear"):
        ...         return {"gain": shape[:-1]}
        ...     def make(self, base, shape, config):
        ...         return GainLayer(base, shape)  # an mlx.nn.Module with a parameter ``gain``
        ...     def change(self, arrays, weight, config, kind):
        ...         return arrays["gain"][..., None] * weight
        >>> qlab.register("adapters", Gain())
        >>> a = qlab.Adapter(model, kind="gain")

    Attributes:
        name: the ``kind`` that a user types.
        title: one line that says what it is.
        adapts: kinds of layers that it can change: ``linear``, ``embedding``, ``switch`` (the
            experts of a mixture).
    """

    name: str
    title: str
    adapts: tuple[str, ...] = ("linear",)

    @abstractmethod
    def shapes(self, shape: tuple[int, ...], rank: int, kind: str = "linear") -> Shapes:
        """Return the shapes of the trainable arrays, by parameter name.

        Args:
            shape: ``(out, in)`` of the weight; of an embedding ``(tokens, width)``, of experts
                ``(experts, out, in)``.
            rank: inner width.
            kind: of the layer. The number of trainable parameters does not depend on it.
        """

    def size(self, shape: tuple[int, ...], rank: int) -> int:
        """Return the number of trainable parameters on a weight of shape ``(…, out, in)``."""
        return sum(prod(array) for array in self.shapes(shape, rank).values())

    @abstractmethod
    def make(self, base: Any, shape: tuple[int, ...], config: LoRAConfig) -> Any:
        """Return a module that runs a frozen layer and adds the change, at first without effect.

        Args:
            base: a frozen layer: callable, ``dense(dtype)`` returns its weight ``(…, out, in)``,
                and ``layer`` is what it wraps; that of an embedding has ``as_linear``, and so must
                the module then. Experts are called with ``(x, indices, sorted_indices=False)``, as
                mlx-lm's ``SwitchLinear``.
            shape: ``(…, out, in)`` of its weight.
            config: rank, scale, dropout, dtype.
        """

    def compensated(self, outer: Any, inner: Any, norms: Any) -> dict[str, Any]:
        """Return trainable arrays by name that add ``scale`` times the product of two factors.

        Args:
            outer: ``(in, rank)``; of an embedding ``(tokens, rank)``, of experts ``(experts, rank,
                in)``.
            inner: ``(rank, out)``; of an embedding ``(rank, width)``, of experts ``(experts, out,
                rank)``.
            norms: ``(…, out)``, lengths of the rows of the weight before it was quantized.

        Raises:
            ConfigError: the kind has no error-compensating initialization.
        """
        raise ConfigError(
            f"kind={self.name!r} has no error-compensating initialization; use init='default'."
        )

    def change(self, arrays: Mapping[str, Any], weight: Any, config: LoRAConfig, kind: str) -> Any:
        """Return D, what trained arrays add to a layer's weight; ``fuse`` and ``preview`` need it.

        Args:
            arrays: the layer's trained arrays by name, float32.
            weight: the base's dequantized weight, float32 ``(…, out, in)``.
            config: rank and scale.
            kind: of the layer: ``linear``, ``embedding`` or ``switch``.

        Returns:
            float32 ``(…, out, in)``, the shape of the weight.

        Raises:
            UnsupportedError: the kind does not say what it adds.
        """
        raise UnsupportedError(
            f"kind={self.name!r} cannot be fused: it does not say what it adds to the weight "
            "(AdapterKind.change)."
        )

    def mlx_obstacle(self, layer: LayerSpec) -> str | None:
        """Return why stock mlx-lm cannot run the kind on a layer, after "it"; None if it can."""
        return f"it has no kind {self.name!r}"

    def peft_obstacle(self, layer: LayerSpec) -> str | None:
        """Return why PEFT cannot run the kind on a layer, as a clause; None if it can."""
        return f"PEFT has no kind {self.name!r}"

    def peft_settings(self) -> dict[str, Any] | None:
        """Return the options of PEFT's ``LoraConfig`` that mean this kind; None if none do."""
        return None


INITS = {
    "default": "A drawn, B zero: the model starts as it is",
    "residual": "the quantization error's largest directions, without data",
    "diagonal": "the same, weighted by the mean square of each input",
    "qera": "the same, weighted by all second moments of the inputs: the best that the rank allows",
}
ALL_LINEAR = "all-linear"
_DTYPES = {"float32": 4, "bfloat16": 2}  # in float16 the optimizers' small constants round to 0
_LAYER_KINDS = {"linear": "linear", "embedding": "an embedding", "switch": "a stack of experts"}


@positional_settings
@reject_unknown_arguments
@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """A low-rank adapter: ``W + scale · B·A`` on chosen layers.

    Example:
        >>> config = qlab.LoRAConfig(rank=16, keys=("q_proj", "v_proj"))
        >>> config.alpha
        32.0
        >>> qlab.estimate(model, adapter=config).total_nbytes

    Args:
        rank: inner width of the two factors.
        scale: factor before the product; alpha = scale × rank.
        dropout: share of the adapter's inputs set to zero while training, in [0, 1).
        num_layers: blocks that get adapters, counted from the last; −1 means all.
        keys: layers to adapt, each a name such as ``q_proj``, the end of a path, a pattern, or
            ``all-linear``; None means the same as ``all-linear``, and what mlx-lm means by it:
            every linear layer within the blocks, the experts of a mixture too (each expert gets
            factors for itself). Embeddings and the head only by name.
        kind: a file on the shelf ``adapters``; ``adapter_kind`` is the object.
        dtype: of the factors: ``float32`` or ``bfloat16``; products are made in the activations'
            dtype.
        rslora: whether alpha is divided by the root of the rank instead of the rank (Kalajdzievski
            2023, arXiv:2312.03732).
        init: what the factors are before the first step: ``default`` (the model stays as it is) or
            an error-compensating initialization (``engine/adapt/init.py``).

    Raises:
        ConfigError: a value is not legal.
    """

    rank: int = 8
    scale: float = 2.0
    dropout: float = 0.0
    num_layers: int = -1
    keys: tuple[str, ...] | None = None
    kind: str = "lora"
    dtype: str = "float32"
    rslora: bool = False
    init: str = "default"

    def __post_init__(self) -> None:
        check_whole("rank", self.rank, 1)
        if not is_whole(self.num_layers, -1) or self.num_layers == 0:
            raise ConfigError(
                f"num_layers={self.num_layers!r} is not legal; "
                "it is a number of blocks, or -1 for all."
            )
        check_number("scale", self.scale, "a number other than 0", lambda x: x != 0)
        check_number("dropout", self.dropout, "a share in [0, 1)", lambda x: 0 <= x < 1)
        object.__setattr__(self, "keys", _keys(self.keys))
        check_choice("dtype", self.dtype, _DTYPES)
        check_flag("rslora", self.rslora)
        check_choice("init", self.init, INITS)
        _ = self.adapter_kind  # refuses a name that is not on the shelf

    @property
    def adapter_kind(self) -> AdapterKind:
        """The kind on the shelf that this config names."""
        return registry.get("adapters", self.kind)

    @property
    def adapter(self) -> AdapterKind:
        """Old name of ``adapter_kind``."""
        deprecated_name("LoRAConfig.adapter", "LoRAConfig.adapter_kind")
        return self.adapter_kind

    @property
    def alpha(self) -> float:
        """Scale × rank; with ``rslora`` scale × the root of the rank."""
        return self.scale * self._alpha_divisor

    @property
    def _alpha_divisor(self) -> float:
        return sqrt(self.rank) if self.rslora else self.rank

    def with_alpha(self, alpha: float) -> LoRAConfig:
        """Return the same adapter with the scale that gives this alpha."""
        check_number("alpha", alpha, "a number other than 0", lambda x: x != 0)
        return replace(self, scale=alpha / self._alpha_divisor)

    def scaled(self, alpha: float | None, scale: float | None) -> LoRAConfig:
        """Return the same adapter with this alpha or this scale; with neither, as it is.

        Raises:
            ConfigError: both are given.
        """
        if alpha is not None and scale is not None:
            raise ConfigError(
                f"alpha={alpha!r} and scale={scale!r} say the same thing twice; give one of them."
            )
        if alpha is not None:
            return self.with_alpha(alpha)
        if scale is not None:
            return replace(self, scale=scale)
        return self

    def first_difference(self, other: LoRAConfig, but: tuple[str, ...] = ()) -> str:
        """Return the first setting in which another config differs; empty if none does.

        Args:
            other: the other.
            but: settings that may differ.
        """
        for field in fields(self):
            name = field.name
            if name not in but and getattr(self, name) != getattr(other, name):
                return name
        return ""

    @property
    def itemsize(self) -> int:
        """Bytes of one trainable parameter."""
        return _DTYPES[self.dtype]

    def size(self, spec: ModelSpec) -> int:
        """Return the number of trainable parameters on a model."""
        kind = self.adapter_kind
        return sum(kind.size(layer.shape, self.rank) for layer in self.targets(spec))

    def targets(self, spec: ModelSpec) -> tuple[LayerSpec, ...]:
        """Return the layers of a model that get adapters, in model order.

        Raises:
            ConfigError: more blocks than the model has, a rank above a layer's smaller width, or a
                key of a layer that the kind does not adapt.
            LayerNotFoundError: a key matches no layer; names the nearest.
        """
        blocks = self._blocks(spec)
        for key in self.keys or ():
            self._check_key(key, spec)
        targets = tuple(layer for layer in spec.layers if self._adapts(layer, blocks))
        if not targets:
            raise ConfigError(
                f"No layer of {spec.name!r} gets an adapter: "
                f"keys={self.keys!r}, num_layers={self.num_layers}."
            )
        for layer in targets:
            self._check_rank(layer)
        return targets

    def _blocks(self, spec: ModelSpec) -> set[int]:
        """Numbers of the blocks that get adapters."""
        if self.num_layers > len(spec.blocks):
            raise ConfigError(
                f"num_layers={self.num_layers}, but {spec.name!r} has {len(spec.blocks)} blocks; "
                "use -1 for all."
            )
        if self.num_layers < 0:
            return set(spec.blocks)
        return set(spec.blocks[-self.num_layers :])

    def _adapts(self, layer: LayerSpec, blocks: set[int]) -> bool:
        if layer.kind not in self.adapter_kind.adapts:
            return False
        if layer.block is not None and layer.block not in blocks:
            return False
        return any(_matches(layer, key) for key in self.keys or (ALL_LINEAR,))

    def _check_key(self, key: str, spec: ModelSpec) -> None:
        """Refuse a key that names no layer, or only layers that the kind cannot change."""
        matches = [layer for layer in spec.layers if _matches(layer, key)]
        if not matches:
            roles = {layer.role for layer in spec.layers}
            names = roles | {role.split(".")[-1] for role in roles}
            raise LayerNotFoundError(
                f"No layer of {spec.name!r} matches the key {key!r}.{nearest(key, names)}"
            )
        adapts = self.adapter_kind.adapts
        if not any(layer.kind in adapts for layer in matches):
            first = matches[0]
            raise ConfigError(
                f"{first.path!r} is {_LAYER_KINDS[first.kind]}; "
                f"kind={self.kind!r} adapts {' and '.join(adapts)} layers."
            )

    def _check_rank(self, layer: LayerSpec) -> None:
        largest = min(layer.shape[-2:])
        if self.rank > largest:
            width = " × ".join(map(str, layer.shape))
            raise ConfigError(
                f"rank={self.rank} is above the width of {layer.path!r} ({width}); "
                f"the largest is {largest}."
            )


def _keys(keys: Any) -> tuple[str, ...] | None:
    """Return the keys as a tuple; one name may stand alone."""
    if keys is None:
        return None
    names = (keys,) if isinstance(keys, str) else keys
    legal = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    if not legal or not names:
        raise ConfigError(
            f"keys={keys!r} is not legal; "
            "it is a list of names or patterns of layers, or None for all."
        )
    return tuple(names)


def _matches(layer: LayerSpec, key: str) -> bool:
    if key == ALL_LINEAR:
        return layer.kind != "embedding" and layer.block is not None
    if layer.kind == "embedding" and key.split(".")[-1] == "*":
        return False  # a pattern of any layer does not name the embedding
    if layer.path == key or layer.path.endswith(f".{key}"):
        return True
    return fnmatchcase(layer.path, key)
