"""What a kind of adapter must declare and do. The kinds themselves are files in ``adapters/``.

Knows no model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import sqrt
from typing import Any

from qlab import registry
from qlab.core.config.legal import check_choice, check_flag, check_number, check_whole, is_whole
from qlab.core.config.spec import LayerSpec, ModelSpec
from qlab.errors import ConfigError, LayerNotFoundError, named, nearest


class AdapterKind(ABC):
    """A small trainable change of a frozen layer. One instance per kind stands on the shelf.

    Attributes:
        name: the ``kind`` that a user types.
        title: one line that says what it is.
        adapts: kinds of layers that it can change: ``linear``, ``embedding``, ``switch``.
    """

    name: str
    title: str
    adapts: tuple[str, ...] = ("linear",)

    @abstractmethod
    def shapes(
        self, shape: tuple[int, ...], rank: int, kind: str = "linear"
    ) -> dict[str, tuple[int, ...]]:
        """Shapes of the trainable arrays, by parameter name.

        Args:
            shape: ``(out, in)`` of the weight; of an embedding ``(tokens, width)``, of experts
                ``(experts, out, in)``.
            rank: inner width.
            kind: of the layer. The number of trainable parameters does not depend on it.
        """

    def size(self, shape: tuple[int, ...], rank: int) -> int:
        """Number of trainable parameters on a weight of shape ``(…, out, in)``."""
        from math import prod

        return sum(prod(s) for s in self.shapes(shape, rank).values())

    @abstractmethod
    def make(self, base: Any, shape: tuple[int, ...], config: LoRAConfig) -> Any:
        """Return a module that runs the frozen ``base`` and adds the change, at first without
        effect.

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
            ConfigError: the kind cannot start so.
        """
        raise ConfigError(
            f"kind={self.name!r} cannot make up for the quantization error; use init='default'."
        )


INITS = {
    "default": "A drawn, B zero: the model starts as it is",
    "residual": "the quantization error's largest directions, without data",
    "diagonal": "the same, weighted by the mean square of each input",
    "qera": "the same, weighted by all second moments of the inputs: the best that the rank allows",
}
ALL_LINEAR = "all-linear"
_DTYPES = {"float32": 4, "bfloat16": 2}  # in float16 the optimizers' small constants round to 0


@named
@dataclass(frozen=True)
class LoRAConfig:
    """A low-rank adapter: ``W + scale · B·A`` on chosen layers.

    Args:
        rank: inner width of the two factors.
        scale: factor before the product; alpha = scale × rank.
        dropout: share of the adapter's inputs set to zero while training, in [0, 1).
        num_layers: blocks that get adapters, counted from the last; −1 means all.
        keys: layers to adapt, each a name such as ``q_proj``, the end of a path, a pattern, or
            ``all-linear``; None means the same as ``all-linear``, and what mlx-lm means by it:
            every linear layer within the blocks, the experts of a mixture too (each expert gets
            factors of its own). Embeddings and the head only by name.
        kind: a file on the shelf ``adapters``.
        dtype: of the factors: ``float32`` or ``bfloat16``; products are made in the activations'
            dtype.
        rslora: whether alpha is divided by the root of the rank instead of the rank (Kalajdzievski
            2023, arXiv:2312.03732).
        init: what the factors are before the first step: ``default`` (no change of the model) or a
            start that makes up for the quantization error (``engine/adapt/init.py``).

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
                f"num_layers={self.num_layers!r} is not legal; it is a number of blocks, or -1 for all."
            )
        check_number("scale", self.scale, "a number other than 0", lambda x: x != 0)
        check_number("dropout", self.dropout, "a share in [0, 1)", lambda x: 0 <= x < 1)
        keys = (self.keys,) if isinstance(self.keys, str) else self.keys
        if keys is not None:
            if (
                not isinstance(keys, (list, tuple))
                or not keys
                or not all(isinstance(key, str) for key in keys)
            ):
                raise ConfigError(
                    f"keys={self.keys!r} is not legal; it is a list of names or patterns of layers, or None for all."
                )
            object.__setattr__(self, "keys", tuple(keys))
        check_choice("dtype", self.dtype, _DTYPES)
        check_flag("rslora", self.rslora)
        check_choice("init", self.init, INITS)
        _ = self.adapter

    @property
    def adapter(self) -> AdapterKind:
        """The kind on the shelf that this config names."""
        return registry.get("adapters", self.kind)

    @property
    def alpha(self) -> float:
        """Scale × rank; with ``rslora`` scale × the root of the rank."""
        return self.scale * (sqrt(self.rank) if self.rslora else self.rank)

    def with_alpha(self, alpha: float) -> LoRAConfig:
        """Return the same adapter with the scale that gives this alpha."""
        check_number("alpha", alpha, "a number other than 0", lambda x: x != 0)
        return replace(self, scale=alpha / (sqrt(self.rank) if self.rslora else self.rank))

    def scaled(self, alpha: float | None, scale: float | None) -> LoRAConfig:
        """Return the same adapter with this alpha or this scale; with neither, as it is.

        Raises:
            ConfigError: both are given.
        """
        if alpha is not None and scale is not None:
            raise ConfigError(
                f"alpha={alpha!r} and scale={scale!r} say the same thing twice; give one of them."
            )
        return (
            self.with_alpha(alpha)
            if alpha is not None
            else self
            if scale is None
            else replace(self, scale=scale)
        )

    @property
    def itemsize(self) -> int:
        """Bytes of one number of the factors."""
        return _DTYPES[self.dtype]

    def targets(self, spec: ModelSpec) -> tuple[LayerSpec, ...]:
        """Return the layers of a model that get adapters, in model order.

        Raises:
            ConfigError: more blocks than the model has, a rank above a layer's smaller width, or a
                key of a layer that the kind does not adapt.
            LayerNotFoundError: a key matches no layer; names the nearest.
        """
        blocks = spec.blocks
        if self.num_layers > len(blocks):
            raise ConfigError(
                f"num_layers={self.num_layers}, but {spec.name!r} has {len(blocks)} blocks; use -1 for all."
            )
        taken = set(blocks if self.num_layers < 0 else blocks[-self.num_layers :])
        found = tuple(
            x for x in spec.layers if self._wants(x) and (x.block is None or x.block in taken)
        )
        for key in self.keys or ():
            matched = [layer for layer in spec.layers if _matches(layer, key)]
            if matched and not any(layer.kind in self.adapter.adapts for layer in matched):
                kind = {
                    "linear": "linear",
                    "embedding": "an embedding",
                    "switch": "a stack of experts",
                }[matched[0].kind]
                adapts = " and ".join(self.adapter.adapts)
                raise ConfigError(
                    f"{matched[0].path!r} is {kind}; kind={self.kind!r} adapts {adapts} layers."
                )
            if not matched:
                names = {layer.role.split(".")[-1] for layer in spec.layers} | {
                    layer.role for layer in spec.layers
                }
                raise LayerNotFoundError(
                    f"No layer of {spec.name!r} matches the key {key!r}.{nearest(key, names)}"
                )
        if not found:
            raise ConfigError(
                f"No layer of {spec.name!r} gets an adapter: keys={self.keys!r}, num_layers={self.num_layers}."
            )
        for layer in found:
            if self.rank > min(layer.shape[-2:]):
                width = " × ".join(map(str, layer.shape))
                raise ConfigError(
                    f"rank={self.rank} is above the width of {layer.path!r} ({width}); the largest is {min(layer.shape[-2:])}."
                )
        return found

    def size(self, spec: ModelSpec) -> int:
        """Number of trainable parameters on a model."""
        return sum(self.adapter.size(layer.shape, self.rank) for layer in self.targets(spec))

    def _wants(self, layer: LayerSpec) -> bool:
        if layer.kind not in self.adapter.adapts:
            return False
        return any(_matches(layer, key) for key in self.keys or (ALL_LINEAR,))


def _matches(layer: LayerSpec, key: str) -> bool:
    if key == ALL_LINEAR:
        return layer.kind != "embedding" and layer.block is not None
    if (
        layer.kind == "embedding" and key.split(".")[-1] == "*"
    ):  # whatever the place, an embedding wants to be named
        return False
    return layer.path == key or layer.path.endswith(f".{key}") or fnmatchcase(layer.path, key)
