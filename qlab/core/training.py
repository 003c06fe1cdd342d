"""What to train and how: ``LoRAConfig`` for the adapter, ``TrainConfig`` for the run.

Both are frozen, and ``eval(repr(x)) == x``. Spelled as mlx-lm spells them. Knows no model but its spec.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import isfinite
from typing import Any

from qlab import registry
from qlab.core.adapter import AdapterKind
from qlab.core.optimizer import OptimizerKind
from qlab.core.spec import LayerSpec, ModelSpec
from qlab.errors import ConfigError, LayerNotFoundError, nearest

_DTYPES = {"float32": 4, "bfloat16": 2}  # in float16 the optimizers' small constants round to 0


@dataclass(frozen=True)
class LoRAConfig:
    """A low-rank adapter: ``W + scale · B·A`` on chosen layers.

    Args:
        rank: inner width of the two factors.
        scale: factor before the product; alpha = scale × rank.
        dropout: share of the adapter's inputs set to zero while training, in [0, 1).
        num_layers: blocks that get adapters, counted from the last; −1 means all.
        keys: layers to adapt, each a name such as ``q_proj``, the end of a path, or a pattern; None means every linear
            layer within the blocks.
        kind: a file on the shelf ``adapters``.
        dtype: of the factors: ``float32`` or ``bfloat16``; products are made in the activations' dtype.

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

    def __post_init__(self) -> None:
        _whole("rank", self.rank, 1)
        if (
            isinstance(self.num_layers, bool)
            or not isinstance(self.num_layers, int)
            or self.num_layers == 0
            or self.num_layers < -1
        ):
            raise ConfigError(f"num_layers={self.num_layers!r} is not legal; it is a number of blocks, or -1 for all.")
        _number("scale", self.scale, "a number other than 0", lambda x: x != 0)
        _number("dropout", self.dropout, "a share in [0, 1)", lambda x: 0 <= x < 1)
        keys = (self.keys,) if isinstance(self.keys, str) else self.keys
        if keys is not None:
            if not isinstance(keys, (list, tuple)) or not keys or not all(isinstance(key, str) for key in keys):
                raise ConfigError(
                    f"keys={self.keys!r} is not legal; it is a list of names or patterns of layers, or None for all."
                )
            object.__setattr__(self, "keys", tuple(keys))
        if not isinstance(self.dtype, str) or self.dtype not in _DTYPES:
            raise ConfigError(
                f"dtype={self.dtype!r} is not legal; choose one of {', '.join(_DTYPES)}.{nearest(self.dtype, _DTYPES)}"
            )
        _ = self.adapter

    @property
    def adapter(self) -> AdapterKind:
        """The kind on the shelf that this config names."""
        return registry.get("adapters", self.kind)

    @property
    def alpha(self) -> float:
        """Scale × rank."""
        return self.scale * self.rank

    @property
    def itemsize(self) -> int:
        """Bytes of one number of the factors."""
        return _DTYPES[self.dtype]

    def targets(self, spec: ModelSpec) -> tuple[LayerSpec, ...]:
        """Return the layers of a model that get adapters, in model order.

        Raises:
            ConfigError: more blocks than the model has, a rank above a layer's smaller width, or a key of no linear layer.
            LayerNotFoundError: a key matches no layer; names the nearest.
        """
        blocks = sorted({layer.block for layer in spec.layers if layer.block is not None})
        if self.num_layers > len(blocks):
            raise ConfigError(f"num_layers={self.num_layers}, but {spec.name!r} has {len(blocks)} blocks; use -1 for all.")
        taken = set(blocks if self.num_layers < 0 else blocks[-self.num_layers :])
        found = tuple(x for x in spec.layers if self._wants(x) and (x.block is None or x.block in taken))
        for key in self.keys or ():
            matched = [layer for layer in spec.layers if _matches(layer, key)]
            if matched and not any(layer.kind == "linear" for layer in matched):
                kind = {"embedding": "an embedding", "switch": "a stack of experts"}[matched[0].kind]
                raise ConfigError(f"{matched[0].path!r} is {kind}; kind={self.kind!r} adapts linear layers.")
            if not matched:
                names = {layer.role.split(".")[-1] for layer in spec.layers} | {layer.role for layer in spec.layers}
                raise LayerNotFoundError(f"No layer of {spec.name!r} matches the key {key!r}.{nearest(key, names)}")
        if not found:
            raise ConfigError(f"No layer of {spec.name!r} gets an adapter: keys={self.keys!r}, num_layers={self.num_layers}.")
        for layer in found:
            if self.rank > min(layer.shape[-2:]):
                width = " × ".join(map(str, layer.shape))
                raise ConfigError(
                    f"rank={self.rank} is above the width of {layer.path!r} ({width}); the largest is {min(layer.shape[-2:])}."
                )
        return found

    def size(self, spec: ModelSpec) -> int:
        """Number of trainable numbers on a model."""
        return sum(self.adapter.size(layer.shape, self.rank) for layer in self.targets(spec))

    def _wants(self, layer: LayerSpec) -> bool:
        if layer.kind != "linear":
            return False
        if self.keys is None:
            return layer.block is not None
        return any(_matches(layer, key) for key in self.keys)


def _matches(layer: LayerSpec, key: str) -> bool:
    return layer.path == key or layer.path.endswith(f".{key}") or fnmatchcase(layer.path, key)


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Args:
        iters: optimizer steps.
        batch_size: rows that pass the model at once.
        max_seq_length: tokens in the longest row.
        learning_rate: of the optimizer.
        optimizer: a file on the shelf ``optimizers``.
        grad_checkpoint: keep only the input of each block, and compute the rest again on the way back.
        grad_accumulation_steps: batches that make one optimizer step.
        loss_chunk: tokens whose logits exist at once; 0 means all.

    Raises:
        ConfigError: a value is not legal.
    """

    iters: int = 200
    batch_size: int = 4
    max_seq_length: int = 512
    learning_rate: float = 1e-4
    optimizer: str = "adamw"
    grad_checkpoint: bool = False
    grad_accumulation_steps: int = 1
    loss_chunk: int = 512

    def __post_init__(self) -> None:
        for name in ("iters", "batch_size", "grad_accumulation_steps"):
            _whole(name, getattr(self, name), 1)
        _whole("max_seq_length", self.max_seq_length, 2)
        _whole("loss_chunk", self.loss_chunk, 0)
        if not isinstance(self.grad_checkpoint, bool):
            raise ConfigError(f"grad_checkpoint={self.grad_checkpoint!r} is not legal; it is True or False.")
        _number("learning_rate", self.learning_rate, "a number above 0", lambda x: x > 0)
        _ = self.kind

    @property
    def kind(self) -> OptimizerKind:
        """The optimizer on the shelf that this config names."""
        return registry.get("optimizers", self.optimizer)

    @property
    def tokens(self) -> int:
        """Positions that pass the model at once."""
        return self.batch_size * self.max_seq_length


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}={value!r} is not legal; it is a whole number, {least} or more.")


def _number(name: str, value: Any, what: str, legal: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value) or not legal(value):
        raise ConfigError(f"{name}={value!r} is not legal; it is {what}.")
