"""Training runs: what a user may ask for (``TrainConfig``) and what an optimizer must do.

The optimizers themselves are files in ``optimizers/``. Knows no model and no array library.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from qlab import registry
from qlab.core.config.legal import check_choice, check_flag, check_number, check_whole
from qlab.deprecated import deprecated_name, positional_settings
from qlab.errors import reject_unknown_arguments


@dataclass(frozen=True)
class MlxLmOptimizer:
    """How stock mlx-lm makes the same optimizer, for ``Trainer.to_yaml(data)``.

    Attributes:
        name: the optimizer in mlx-lm's words.
        options: its settings that make it the same; decay and learning rate are added.
        difference: what mlx-lm then does otherwise, as a sentence; empty if nothing.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    difference: str = ""


class OptimizerKind(ABC):
    """How parameters are changed by gradients. One instance per kind stands on the shelf.

    A subclass says all that qlab needs of an optimizer, so that one that is registered in a cell
    can be trained with, estimated, resumed and written as a recipe like those on the shelf.

    Example:
        >>> class Sgd(qlab.OptimizerKind):
        ...     name = "sgd"
        ...     title = "SGD: no state"
        ...     elementwise = True
        ...
        ...     def state_nbytes(self, shape, itemsize):
        ...         return 0
        ...
        ...     def make(self, learning_rate, weight_decay=0.0):
        ...         return mlx.optimizers.SGD(learning_rate, weight_decay=weight_decay)
        >>> qlab.register("optimizers", Sgd())
        >>> config = qlab.TrainConfig(optimizer="sgd")

    Attributes:
        name: the ``optimizer`` that a user types.
        title: one line that says what it is: its name, a colon, the rest.
        elementwise: whether each element is updated by itself, with state of the parameter's
            shape. Then all parameters are updated as one vector, to the same bits; False is always
            right.
        mlx_lm: how stock mlx-lm makes the same optimizer; None if it cannot.
    """

    name: str
    title: str
    elementwise: bool = False
    mlx_lm: MlxLmOptimizer | None = None

    @property
    def label(self) -> str:
        """Its name as the literature writes it: the title up to the colon."""
        return self.title.partition(":")[0]

    @abstractmethod
    def state_nbytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        """Return the bytes that stay from step to step for one trainable array.

        Args:
            shape: of the array.
            itemsize: bytes of one element.
        """

    @abstractmethod
    def make(self, learning_rate: float, weight_decay: float = 0.0) -> Any:
        """Return an ``mlx.optimizers.Optimizer``.

        Args:
            learning_rate: once warm.
            weight_decay: share of each parameter taken off per step and unit of learning rate,
                decoupled from the gradient.
        """


LR_SCHEDULES = ("constant", "linear", "cosine")
ON_NONFINITE = ("skip", "stop")


@positional_settings
@reject_unknown_arguments
@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run: how long, on how much at once, and by which optimizer.

    Example:
        >>> config = qlab.TrainConfig(iters=500, batch_size=2, grad_checkpoint=True)
        >>> t = qlab.Trainer(a, "rows.jsonl", config)

    Args:
        iters: optimizer steps.
        epochs: passes through the rows; replaces ``iters`` if given.
        batch_size: rows that pass the model at once.
        max_seq_length: tokens in the longest row; longer ones are cut.
        learning_rate: of the optimizer, after the warm-up.
        lr_schedule: ``constant``, ``linear`` (to 0) or ``cosine`` (to 0).
        warmup: steps in which the learning rate rises from 0.
        optimizer: a file on the shelf ``optimizers``; ``optimizer_kind`` is the object.
        weight_decay: share of each parameter taken off per step and unit of learning rate.
        max_grad_norm: gradients are scaled down to this global norm; 0 leaves them as they are.
        grad_checkpoint: store only the input of each block, and compute the rest again in the
            backward pass.
        window: blocks in flight at once, with ``grad_checkpoint``: more are faster on a GPU and
            take more memory, for the same numbers. 0 leaves it to qlab: a run takes as many as pay
            and fit.
        grad_accumulation_steps: batches that make one optimizer step.
        loss_chunk: tokens whose logits exist at once; 0 means all.
        mask_prompt: whether only answers are targets (completions, or what the assistant says);
            text rows are whole targets.
        pack: whether several rows share one, none seeing another.
        steps_per_eval: steps between validations; 0 is every quarter of an epoch.
        val_batches: batches of a validation; −1 means all rows held out.
        early_stop: validations without a better loss after which the run ends; 0 means never.
        steps_per_save: steps between checkpoints.
        on_nonfinite: what to do when loss or gradient is no number: ``skip`` leaves the step out
            and goes on, ``stop`` ends the run; the adapter keeps its last good state either way.
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
            check_whole(name, getattr(self, name), 1)
        for name in ("window", "loss_chunk", "warmup", "steps_per_eval", "early_stop", "seed"):
            check_whole(name, getattr(self, name), 0)
        check_whole("max_seq_length", self.max_seq_length, 2)
        if self.val_batches != -1:
            check_whole("val_batches", self.val_batches, 1)
        for name in ("grad_checkpoint", "mask_prompt", "pack"):
            check_flag(name, getattr(self, name))
        check_choice("lr_schedule", self.lr_schedule, LR_SCHEDULES)
        check_choice("on_nonfinite", self.on_nonfinite, ON_NONFINITE)
        check_number("learning_rate", self.learning_rate, "a number above 0", lambda x: x > 0)
        if self.epochs is not None:
            check_number("epochs", self.epochs, "a number above 0, or None", lambda x: x > 0)
        for name in ("weight_decay", "max_grad_norm"):
            check_number(name, getattr(self, name), "a number, 0 or more", lambda x: x >= 0)
        _ = self.optimizer_kind  # refuses a name that is not on the shelf

    @property
    def optimizer_kind(self) -> OptimizerKind:
        """The optimizer on the shelf that this config names."""
        return registry.get("optimizers", self.optimizer)

    @property
    def kind(self) -> OptimizerKind:
        """Old name of ``optimizer_kind``."""
        deprecated_name("TrainConfig.kind", "TrainConfig.optimizer_kind")
        return self.optimizer_kind

    @property
    def tokens(self) -> int:
        """Positions that pass the model at once."""
        return self.batch_size * self.max_seq_length
