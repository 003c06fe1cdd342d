"""What to train and how: ``LoRAConfig`` for the adapter, ``TrainConfig`` for the run.

Both are frozen, and ``eval(repr(x)) == x``. Spelled as mlx-lm spells them. Knows no model but its spec.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import isfinite, sqrt
from typing import Any

from qlab import registry
from qlab.core.adapter import AdapterKind
from qlab.core.optimizer import OptimizerKind
from qlab.core.spec import LayerSpec, ModelSpec
from qlab.errors import ConfigError, LayerNotFoundError, named, nearest

INITS = {
    "default": "A drawn, B zero: the model starts as it is",
    "residual": "the quantization error's largest directions, without data",
    "diagonal": "the same, weighted by the mean square of each input",
    "qera": "the same, weighted by all second moments of the inputs: the best that the rank allows",
}
ALL_LINEAR = "all-linear"
LR_SCHEDULES = ("constant", "linear", "cosine")
ON_NONFINITE = ("skip", "stop")
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
        keys: layers to adapt, each a name such as ``q_proj``, the end of a path, a pattern, or ``all-linear``; None means
            the same as ``all-linear``, and what mlx-lm means by it: every linear layer within the blocks, the experts of a
            mixture too (each expert gets factors of its own). Embeddings and the head only by name.
        kind: a file on the shelf ``adapters``.
        dtype: of the factors: ``float32`` or ``bfloat16``; products are made in the activations' dtype.
        rslora: whether alpha is divided by the root of the rank instead of the rank (Kalajdzievski 2023, arXiv:2312.03732).
        init: what the factors are before the first step: ``default`` (no change of the model) or a start that makes up for
            the quantization error (``engine/start.py``).

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
        _choice("dtype", self.dtype, _DTYPES)
        _flag("rslora", self.rslora)
        _choice("init", self.init, INITS)
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
        _number("alpha", alpha, "a number other than 0", lambda x: x != 0)
        return replace(self, scale=alpha / (sqrt(self.rank) if self.rslora else self.rank))

    def scaled(self, alpha: float | None, scale: float | None) -> LoRAConfig:
        """Return the same adapter with this alpha or this scale; with neither, as it is.

        Raises:
            ConfigError: both are given.
        """
        if alpha is not None and scale is not None:
            raise ConfigError(f"alpha={alpha!r} and scale={scale!r} say the same thing twice; give one of them.")
        return self.with_alpha(alpha) if alpha is not None else self if scale is None else replace(self, scale=scale)

    @property
    def itemsize(self) -> int:
        """Bytes of one number of the factors."""
        return _DTYPES[self.dtype]

    def targets(self, spec: ModelSpec) -> tuple[LayerSpec, ...]:
        """Return the layers of a model that get adapters, in model order.

        Raises:
            ConfigError: more blocks than the model has, a rank above a layer's smaller width, or a key of a layer that the
                kind does not adapt.
            LayerNotFoundError: a key matches no layer; names the nearest.
        """
        blocks = sorted({layer.block for layer in spec.layers if layer.block is not None})
        if self.num_layers > len(blocks):
            raise ConfigError(f"num_layers={self.num_layers}, but {spec.name!r} has {len(blocks)} blocks; use -1 for all.")
        taken = set(blocks if self.num_layers < 0 else blocks[-self.num_layers :])
        found = tuple(x for x in spec.layers if self._wants(x) and (x.block is None or x.block in taken))
        for key in self.keys or ():
            matched = [layer for layer in spec.layers if _matches(layer, key)]
            if matched and not any(layer.kind in self.adapter.adapts for layer in matched):
                kind = {"linear": "linear", "embedding": "an embedding", "switch": "a stack of experts"}[matched[0].kind]
                adapts = " and ".join(self.adapter.adapts)
                raise ConfigError(f"{matched[0].path!r} is {kind}; kind={self.kind!r} adapts {adapts} layers.")
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
        if layer.kind not in self.adapter.adapts:
            return False
        return any(_matches(layer, key) for key in self.keys or (ALL_LINEAR,))


def _matches(layer: LayerSpec, key: str) -> bool:
    if key == ALL_LINEAR:
        return layer.kind != "embedding" and layer.block is not None
    if layer.kind == "embedding" and key.split(".")[-1] == "*":  # whatever the place, an embedding wants to be named
        return False
    return layer.path == key or layer.path.endswith(f".{key}") or fnmatchcase(layer.path, key)


@named
@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Args:
        iters: optimizer steps.
        epochs: passes through the rows; replaces ``iters`` if given.
        batch_size: rows that pass the model at once.
        max_seq_length: tokens in the longest row; longer ones are cut.
        learning_rate: of the optimizer, once warm.
        lr_schedule: ``constant``, ``linear`` (to 0) or ``cosine`` (to 0).
        warmup: steps in which the learning rate rises from 0.
        optimizer: a file on the shelf ``optimizers``.
        weight_decay: share of each parameter taken off per step and unit of learning rate.
        max_grad_norm: gradients are scaled down to this global norm; 0 leaves them as they are.
        grad_checkpoint: keep only the input of each block, and compute the rest again on the way back.
        window: blocks in flight at once, with ``grad_checkpoint``: more are faster on a GPU and take more memory, for the same
            numbers. 0 leaves it to qlab: a run takes as many as pay and fit.
        grad_accumulation_steps: batches that make one optimizer step.
        loss_chunk: tokens whose logits exist at once; 0 means all.
        mask_prompt: whether only answers are targets (completions, or what the assistant says); text rows are whole targets.
        pack: whether several rows share one, none seeing another.
        steps_per_eval: steps between validations; 0 is every quarter of an epoch.
        val_batches: batches of a validation; −1 means all rows held out.
        early_stop: validations without a better loss after which the run ends; 0 means never.
        steps_per_save: steps between checkpoints.
        on_nonfinite: what to do when loss or gradient is no number: ``skip`` leaves the step out and goes on, ``stop`` ends
            the run; the adapter keeps its last good state either way.
        seed: of everything drawn: order of rows, dropout, the adapter's start.

    Raises:
        ConfigError: a value is not legal.
    """

    iters: int = 200
    epochs: float | None = None
    batch_size: int = 4
    max_seq_length: int = 512
    learning_rate: float = 1e-4
    lr_schedule: str = "constant"
    warmup: int = 0
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    grad_checkpoint: bool = False
    window: int = 0
    grad_accumulation_steps: int = 1
    loss_chunk: int = 512
    mask_prompt: bool = True
    pack: bool = False
    steps_per_eval: int = 0
    val_batches: int = 25
    early_stop: int = 0
    steps_per_save: int = 100
    on_nonfinite: str = "skip"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("iters", "batch_size", "grad_accumulation_steps", "steps_per_save"):
            _whole(name, getattr(self, name), 1)
        for name in ("window", "loss_chunk", "warmup", "steps_per_eval", "early_stop", "seed"):
            _whole(name, getattr(self, name), 0)
        _whole("max_seq_length", self.max_seq_length, 2)
        if self.val_batches != -1:
            _whole("val_batches", self.val_batches, 1)
        for name in ("grad_checkpoint", "mask_prompt", "pack"):
            _flag(name, getattr(self, name))
        _choice("lr_schedule", self.lr_schedule, LR_SCHEDULES)
        _choice("on_nonfinite", self.on_nonfinite, ON_NONFINITE)
        _number("learning_rate", self.learning_rate, "a number above 0", lambda x: x > 0)
        if self.epochs is not None:
            _number("epochs", self.epochs, "a number above 0, or None", lambda x: x > 0)
        for name in ("weight_decay", "max_grad_norm"):
            _number(name, getattr(self, name), "a number, 0 or more", lambda x: x >= 0)
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


def _flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r} is not legal; it is True or False.")


def _choice(name: str, value: Any, legal: Iterable[str]) -> None:
    if not isinstance(value, str) or value not in legal:
        raise ConfigError(f"{name}={value!r} is not legal; choose one of {', '.join(legal)}.{nearest(value, legal)}")


def _number(name: str, value: Any, what: str, legal: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value) or not legal(value):
        raise ConfigError(f"{name}={value!r} is not legal; it is {what}.")
