"""Writes a run as a recipe for stock ``mlx_lm.lora``, with comments on what mlx-lm does otherwise.

``Trainer.to_yaml(data)`` calls it. What both packages mean by a setting is compared with mlx-lm
0.32. An optimizer says itself how mlx-lm spells it (``OptimizerKind.mlx_lm``).
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any

from qlab import registry
from qlab.core.config.lora import LoRAConfig
from qlab.core.config.spec import ModelSpec
from qlab.core.config.train import MlxLmOptimizer, TrainConfig
from qlab.engine.adapt.targets import mlx_targets, why_not_mlx
from qlab.errors import ConfigError

ROWS = ("text", "completion", "chat")
# every setting of TrainConfig is written, or named in the header
WRITTEN = {
    "iters",
    "epochs",
    "batch_size",
    "max_seq_length",
    "learning_rate",
    "lr_schedule",
    "warmup",
    "optimizer",
    "weight_decay",
    "grad_checkpoint",
    "grad_accumulation_steps",
    "mask_prompt",
    "steps_per_eval",
    "val_batches",
    "steps_per_save",
    "seed",
}
NAMED = {"max_grad_norm", "window", "loss_chunk", "pack", "early_stop", "on_nonfinite"}
_HEAD = """\
# The same run for stock mlx-lm:  mlx_lm.lora --config THIS_FILE
# What mlx-lm (0.32) does otherwise than qlab:
"""


@dataclass(frozen=True, kw_only=True)
class MlxRecipe:
    """What a recipe is written from.

    Attributes:
        model: folder or hub id of the base as it is trained (quantized, if it is).
        spec: layers of the base.
        lora: config of the adapter.
        train: config of the run.
        data: folder with ``train.jsonl`` and ``valid.jsonl``.
        rows: what the rows are: ``text``, ``completion`` or ``chat``.
        adapter_path: folder that mlx-lm writes.
        iters: optimizer steps, where ``train`` gives epochs.
        steps_per_eval: optimizer steps between validations, where ``train`` leaves it at a quarter
            of an epoch.
        resume_adapter_file: an ``adapters.safetensors`` to start from; needed to start as
            ``lora.init`` says.
    """

    model: str
    spec: ModelSpec
    lora: LoRAConfig
    train: TrainConfig
    data: str
    rows: str = "chat"
    adapter_path: str = "adapters"
    iters: int | None = None
    steps_per_eval: int | None = None
    resume_adapter_file: str | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return self.train.iters if self.iters is None else self.iters


def to_yaml(recipe: MlxRecipe) -> str:
    """Return the text of a file for ``mlx_lm.lora --config``.

    Raises:
        ConfigError: mlx-lm cannot do that: the kind of adapter on that base, the optimizer, or
            epochs without ``iters``.
    """
    import yaml  # mlx-lm reads its recipes with it

    optimizer = _check(recipe)
    train = recipe.train
    config: dict[str, Any] = {
        "model": recipe.model,
        "train": True,
        "data": recipe.data,
        "adapter_path": recipe.adapter_path,
    }
    if recipe.resume_adapter_file:
        config["resume_adapter_file"] = recipe.resume_adapter_file
    config |= _adapter(recipe)
    config |= _optimizer(recipe, optimizer)
    config |= _steps(recipe)
    config |= {
        "batch_size": train.batch_size,
        "max_seq_length": train.max_seq_length,
        "grad_checkpoint": train.grad_checkpoint,
        "mask_prompt": train.mask_prompt and recipe.rows != "text",
        "seed": train.seed,
    }
    notes = [*_always_different(train), *_different_here(recipe, optimizer)]
    comments = [
        textwrap.fill(note, 116, initial_indent="# - ", subsequent_indent="#   ") for note in notes
    ]
    header = _HEAD + "\n".join(comments)
    return f"{header}\n{yaml.safe_dump(config, sort_keys=False, allow_unicode=True)}"


def _check(recipe: MlxRecipe) -> MlxLmOptimizer:
    """Refuse what mlx-lm cannot do at all; return how it spells the optimizer."""
    train = recipe.train
    obstacle = why_not_mlx(recipe.lora, recipe.spec)
    if obstacle:
        raise ConfigError(f"Stock mlx-lm cannot run this: {obstacle}.")
    optimizer = train.optimizer_kind.mlx_lm
    if optimizer is None:
        shelf = registry.shelf("optimizers")
        names = ", ".join(name for name, kind in shelf.items() if kind.mlx_lm)
        raise ConfigError(f"mlx-lm has no optimizer {train.optimizer!r}; it has {names}.")
    if recipe.rows == "mixed":
        raise ConfigError(
            "mlx-lm takes every row for what the first one is; give rows of one kind."
        )
    if recipe.rows not in ROWS:
        raise ConfigError(f"rows={recipe.rows!r} is not legal; choose one of {', '.join(ROWS)}.")
    if train.epochs is not None and recipe.iters is None:
        raise ConfigError(f"mlx-lm counts steps, not epochs={train.epochs!r}; give iters=.")
    return optimizer


def _adapter(recipe: MlxRecipe) -> dict[str, Any]:
    lora = recipe.lora
    num_layers, keys = mlx_targets(lora, recipe.spec)
    settings = {
        "rank": lora.rank,
        "scale": float(lora.scale),
        "dropout": float(lora.dropout),
        "keys": keys,
    }
    return {"fine_tune_type": lora.kind, "num_layers": num_layers, "lora_parameters": settings}


def _optimizer(recipe: MlxRecipe, optimizer: MlxLmOptimizer) -> dict[str, Any]:
    train = recipe.train
    options = {**optimizer.options, "weight_decay": float(train.weight_decay)}
    section: dict[str, Any] = {
        "optimizer": optimizer.name,
        "optimizer_config": {optimizer.name: options},
        "learning_rate": float(train.learning_rate),
    }
    if train.warmup or train.lr_schedule != "constant":
        section["lr_schedule"] = _schedule(train, recipe.steps)
    return section


def _schedule(train: TrainConfig, steps: int) -> dict[str, Any]:
    """Return schedule and warm-up in mlx-lm's words.

    With both, mlx-lm's schedule runs one step behind, since it holds the full rate twice.
    """
    rate = float(train.learning_rate)
    steps_left = max(steps - train.warmup, 1)
    arguments = {
        "constant": ("step_decay", [rate, 1.0, 1]),
        "linear": ("linear_schedule", [rate, 0.0, steps_left]),
        "cosine": ("cosine_decay", [rate, steps_left]),
    }
    name, values = arguments[train.lr_schedule]
    section: dict[str, Any] = {"name": name, "arguments": values}
    if train.warmup:
        section |= {"warmup": train.warmup, "warmup_init": rate / (train.warmup + 1)}
    return section


def _steps(recipe: MlxRecipe) -> dict[str, Any]:
    """Return counts of optimizer steps as counts of batches, which is what mlx-lm counts."""
    train = recipe.train
    each = train.grad_accumulation_steps
    steps_per_eval = train.steps_per_eval or recipe.steps_per_eval or max(1, recipe.steps // 10)
    return {
        "iters": recipe.steps * each,
        "grad_accumulation_steps": each,
        "steps_per_report": each,
        "steps_per_eval": steps_per_eval * each,
        "val_batches": train.val_batches,
        "save_every": train.steps_per_save * each,
    }


def _always_different(train: TrainConfig) -> list[str]:
    """Return what is different in every run."""
    return [
        "The loss has one padding token of every row that is shorter than its batch among its "
        "targets.",
        "A prompt is masked by the length of its own render: wrong for chat templates whose prompt "
        "is no prefix of the whole. In a conversation only the last answer is a target; qlab "
        "trains on all of them.",
        "Batches, their order and the adapter's first values are drawn otherwise; rows that do not "
        "fill a batch are left out.",
        "A batch without targets makes the loss NaN and spoils the adapter "
        f"(qlab: on_nonfinite={train.on_nonfinite!r} leaves the step out or stops).",
    ]


def _different_here(recipe: MlxRecipe, optimizer: MlxLmOptimizer) -> list[str]:
    """Return what is different because of the settings of this run."""
    candidates = [*_run_differences(recipe, optimizer), *_adapter_differences(recipe)]
    return [text for applies, text in candidates if applies]


def _run_differences(recipe: MlxRecipe, optimizer: MlxLmOptimizer) -> list[tuple[Any, str]]:
    """Return differences in the run, each with whether it applies."""
    train = recipe.train
    steps = train.grad_accumulation_steps
    return [
        (
            train.max_grad_norm,
            f"Gradients are not clipped (qlab: max_grad_norm={train.max_grad_norm!r}).",
        ),
        (
            steps > 1,
            "Accumulation averages the means of batches, not the tokens; a step here is one "
            f"batch, so the counts below are {steps} times those of qlab.",
        ),
        (optimizer.difference, optimizer.difference),
        (
            train.warmup and train.lr_schedule != "constant",
            f"After the warm-up the {train.lr_schedule} schedule runs one step behind.",
        ),
        (
            train.pack,
            "Rows are not packed (qlab: pack=True): more padding, and more steps for an epoch.",
        ),
        (
            train.grad_checkpoint,
            "The whole step is handed over at once (qlab: a window of blocks): more memory in "
            "flight.",
        ),
        (
            train.loss_chunk,
            f"All logits exist at once (qlab: loss_chunk={train.loss_chunk}): the peak of memory "
            "is higher.",
        ),
        (train.early_stop, f"It never stops early (qlab: early_stop={train.early_stop})."),
        (train.epochs is not None, f"epochs={train.epochs!r} is written in steps."),
        (
            not train.steps_per_eval and not recipe.steps_per_eval,
            "It validates every tenth of the steps, not every quarter epoch.",
        ),
    ]


def _adapter_differences(recipe: MlxRecipe) -> list[tuple[Any, str]]:
    """Return differences in the adapter, each with whether it applies."""
    lora = recipe.lora
    start = recipe.resume_adapter_file
    initialized = f"The adapter starts without effect (qlab: init={lora.init!r})."
    if start:
        initialized = f"It starts from {start} (qlab: init={lora.init!r})."
    return [
        (lora.dtype != "float32", f"The adapter is float32 (qlab: {lora.dtype})."),
        (lora.rslora, f"rslora and alpha are one number here: scale={lora.scale!r}."),
        (lora.init != "default", initialized),
        (
            lora.dropout and recipe.train.grad_checkpoint,
            "Dropout with grad_checkpoint drops other inputs in the backward pass.",
        ),
    ]
