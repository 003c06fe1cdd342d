"""A run of qlab as a recipe for stock ``mlx_lm.lora``.

The same settings in its words, and what it does otherwise, named.

Knows no data and no weights; what both packages mean by a setting is compared with mlx-lm 0.32.
"""

from __future__ import annotations

import textwrap
from typing import Any

from qlab.core.config.lora import LoRAConfig
from qlab.core.config.spec import ModelSpec
from qlab.core.config.train import TrainConfig
from qlab.engine.adapt.targets import mlx_targets, why_not_mlx
from qlab.errors import ConfigError

ROWS = ("text", "completion", "chat")
# our optimizers in mlx-lm's words: its name, and what makes it the same
_OPTIMIZERS = {
    "adamw": ("adamw", {"bias_correction": True}),
    "adafactor": ("adafactor", {"relative_step": False, "scale_parameter": False}),
    "muon": ("muon", {}),
    "adamw8bit": ("adamw", {"bias_correction": True}),
    "paged_adamw8bit": ("adamw", {"bias_correction": True}),
}
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


def to_yaml(
    model_source: str,
    spec: ModelSpec,
    lora: LoRAConfig,
    train: TrainConfig,
    data_path: str,
    *,
    rows: str = "chat",
    adapter_path: str = "adapters",
    iters: int | None = None,
    steps_per_eval: int | None = None,
    resume_adapter_file: str | None = None,
) -> str:
    """Return the text of a file for ``mlx_lm.lora --config``.

    Args:
        model_source: folder or hub id of the base as it is trained (quantized, if it is).
        spec: its layers.
        lora: the adapter.
        train: the run.
        data_path: folder with ``train.jsonl`` and ``valid.jsonl``.
        rows: what the rows are: ``text``, ``completion`` or ``chat``.
        adapter_path: folder that mlx-lm writes.
        iters: optimizer steps, where ``train`` gives epochs.
        steps_per_eval: optimizer steps between validations, where ``train`` leaves it at a quarter
            of an epoch.
        resume_adapter_file: an ``adapters.safetensors`` to start from; needed to start as
            ``lora.init`` says.

    Raises:
        ConfigError: mlx-lm cannot do that: the kind of adapter on that base, the optimizer, or
            epochs without ``iters``.
    """
    _refuse(spec, lora, train, rows, iters)
    import yaml  # mlx-lm reads its recipes with it

    updates = train.iters if iters is None else iters
    config = {
        "model": model_source,
        "train": True,
        "data": data_path,
        "adapter_path": adapter_path,
        **({"resume_adapter_file": resume_adapter_file} if resume_adapter_file else {}),
        **_adapter(lora, spec),
        **_optimizer(train, updates),
        **_steps(train, updates, steps_per_eval),
        "batch_size": train.batch_size,
        "max_seq_length": train.max_seq_length,
        "grad_checkpoint": train.grad_checkpoint,
        "mask_prompt": train.mask_prompt and rows != "text",
        "seed": train.seed,
    }
    notes = [*_always(train), *_here(lora, train, resume_adapter_file, steps_per_eval)]
    head = "\n".join(
        textwrap.fill(n, 116, initial_indent="# - ", subsequent_indent="#   ") for n in notes
    )
    return f"{_HEAD}{head}\n{yaml.safe_dump(config, sort_keys=False, allow_unicode=True)}"


def _refuse(
    spec: ModelSpec, lora: LoRAConfig, train: TrainConfig, rows: str, iters: int | None
) -> None:
    """Refuse what mlx-lm cannot do at all."""
    obstacle = why_not_mlx(lora, spec)
    if obstacle:
        raise ConfigError(f"Stock mlx-lm cannot run this: {obstacle}.")
    if train.optimizer not in _OPTIMIZERS:
        raise ConfigError(
            f"mlx-lm has no optimizer {train.optimizer!r}; one of {', '.join(_OPTIMIZERS)} can be said."
        )
    if rows == "mixed":
        raise ConfigError(
            "mlx-lm takes every row for what the first one is; give rows of one kind."
        )
    if rows not in ROWS:
        raise ConfigError(f"rows={rows!r} is not legal; choose one of {', '.join(ROWS)}.")
    if train.epochs is not None and iters is None:
        raise ConfigError(f"mlx-lm counts steps, not epochs={train.epochs!r}; give iters=.")


_HEAD = """\
# The same run for stock mlx-lm:  mlx_lm.lora --config THIS_FILE
# What mlx-lm (0.32) does otherwise than qlab:
"""


def _adapter(lora: LoRAConfig, spec: ModelSpec) -> dict[str, Any]:
    num_layers, keys = mlx_targets(lora, spec)
    settings = {
        "rank": lora.rank,
        "scale": float(lora.scale),
        "dropout": float(lora.dropout),
        "keys": keys,
    }
    return {"fine_tune_type": lora.kind, "num_layers": num_layers, "lora_parameters": settings}


def _optimizer(train: TrainConfig, updates: int) -> dict[str, Any]:
    name, options = _OPTIMIZERS[train.optimizer]
    config = {name: {**options, "weight_decay": float(train.weight_decay)}}
    return {
        "optimizer": name,
        "optimizer_config": config,
        "learning_rate": float(train.learning_rate),
        **(
            {"lr_schedule": _schedule(train, updates)}
            if train.warmup or train.lr_schedule != "constant"
            else {}
        ),
    }


def _schedule(train: TrainConfig, updates: int) -> dict[str, Any]:
    """Say schedule and warm-up.

    With both, mlx-lm's schedule runs one step behind, since it holds the full rate twice.
    """
    rate = float(train.learning_rate)
    left = max(updates - train.warmup, 1)
    arguments = {
        "constant": ("step_decay", [rate, 1.0, 1]),
        "linear": ("linear_schedule", [rate, 0.0, left]),
        "cosine": ("cosine_decay", [rate, left]),
    }
    name, values = arguments[train.lr_schedule]
    made: dict[str, Any] = {"name": name, "arguments": values}
    if train.warmup:
        made |= {"warmup": train.warmup, "warmup_init": rate / (train.warmup + 1)}
    return made


def _steps(train: TrainConfig, updates: int, steps_per_eval: int | None) -> dict[str, Any]:
    """Say counts of optimizer steps in batches, as mlx-lm counts."""
    each = train.grad_accumulation_steps
    evals = train.steps_per_eval or steps_per_eval or max(1, updates // 10)
    return {
        "iters": updates * each,
        "grad_accumulation_steps": each,
        "steps_per_report": each,
        "steps_per_eval": evals * each,
        "val_batches": train.val_batches,
        "save_every": train.steps_per_save * each,
    }


def _always(train: TrainConfig) -> list[str]:
    """What is different in every run."""
    return [
        "The loss has one padding token of every row that is shorter than its batch among its targets.",
        "A prompt is masked by the length of its own render: wrong for chat templates whose prompt is no prefix of the whole. "
        "In a conversation only the last answer is a target; qlab trains on all of them.",
        "Batches, their order and the adapter's first values are drawn otherwise; rows that do not fill a batch are left out.",
        "A batch without targets makes the loss NaN and spoils the adapter"
        f" (qlab: on_nonfinite={train.on_nonfinite!r} leaves the step out or stops).",
    ]


def _here(
    lora: LoRAConfig, train: TrainConfig, resume: str | None, steps_per_eval: int | None
) -> list[str]:
    """What is different because of these settings."""
    both = train.warmup and train.lr_schedule != "constant"
    found = [
        (
            train.max_grad_norm,
            f"Gradients are not clipped (qlab: max_grad_norm={train.max_grad_norm!r}).",
        ),
        (
            train.grad_accumulation_steps > 1,
            "Accumulation averages the means of batches, not the tokens; a step here is one "
            f"batch, so the counts below are {train.grad_accumulation_steps} times those of qlab.",
        ),
        (
            train.optimizer.endswith("8bit"),
            f"It has no {train.optimizer!r}: AdamW with float32 moments, four times the state.",
        ),
        (both, f"After the warm-up the {train.lr_schedule} schedule runs one step behind."),
        (
            train.pack,
            "Rows are not packed (qlab: pack=True): more padding, and more steps for an epoch.",
        ),
        (
            train.grad_checkpoint,
            "The whole step is handed over at once (qlab: a window of blocks): more memory in flight.",
        ),
        (
            train.loss_chunk,
            f"All logits exist at once (qlab: loss_chunk={train.loss_chunk}): the peak of memory is higher.",
        ),
        (train.early_stop, f"It never stops early (qlab: early_stop={train.early_stop})."),
        (train.epochs is not None, f"epochs={train.epochs!r} is said in steps."),
        (
            not train.steps_per_eval and not steps_per_eval,
            "It validates every tenth of the steps, not every quarter epoch.",
        ),
        (lora.dtype != "float32", f"The adapter is float32 (qlab: {lora.dtype})."),
        (lora.rslora, f"rslora and alpha are one number here: scale={lora.scale!r}."),
        (
            lora.init != "default",
            f"The adapter starts without effect (qlab: init={lora.init!r})."
            if not resume
            else f"It starts from {resume} (qlab: init={lora.init!r}).",
        ),
        (
            lora.dropout and train.grad_checkpoint,
            "Dropout with grad_checkpoint drops other inputs on the way back.",
        ),
    ]
    return [text for applies, text in found if applies]
