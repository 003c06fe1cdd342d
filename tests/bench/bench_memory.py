"""Foreseen memory against measured: formula and trace against the peak of a real step, over many settings.

``make bench-memory`` (or ``python -m tests.bench.bench_memory [quick]``, without SmolLM2) prints a line a setting and the
summary that docs/guide/memory_accuracy.md shows.
"""

from __future__ import annotations

import sys

import qlab

import numpy as np

from qlab.core.config.quant import QuantConfig
from qlab.core.config.quant import QuantPlan
from qlab.core.memory.setup import Setup
from qlab.core.config.lora import LoRAConfig
from qlab.core.config.train import TrainConfig
from qlab.engine.quantize.quantize import quantize
from qlab.engine.memory.forecast import Forecast
from qlab.engine.memory.measure import measured_peak
from qlab.runtime.job import run_to_end
from qlab.runtime.job import mlx_call
from qlab.runtime.peaks import SHIPPED
from qlab.engine.models.skeleton import skeleton
from tests.models import smollm2

STORAGES = {
    "16": None,
    "2": QuantConfig(bits=2),
    "3": QuantConfig(bits=3),
    "4": QuantConfig(),
    "8": QuantConfig(bits=8),
    "nf4": QuantConfig("nf4"),
    "nf4_dq": QuantConfig("nf4_dq"),
    "mxfp4": QuantConfig("mxfp4"),
    "nvfp4": QuantConfig("nvfp4"),
}
# rank, batch, tokens, checkpoints, adapted blocks (-1: all), chunk of the loss
SETTINGS = [
    (4, 1, 64, False, -1, 512),
    (8, 1, 512, False, 4, 0),
    (8, 2, 256, True, -1, 128),
    (16, 4, 128, False, 16, 512),
    (64, 2, 128, True, -1, 0),
    (32, 1, 256, False, -1, 0),
    (8, 4, 512, True, -1, 512),
    (16, 2, 512, True, 8, 512),
]
PAIRS = [
    ("16", (0, 1, 2, 5, 6)),
    ("2", (1, 4, 6)),
    ("3", (0, 3, 7)),
    ("4", range(8)),
    ("8", (2, 5)),
    ("nf4", (0, 1, 2, 3, 6)),
    ("nf4_dq", (2, 3)),
    ("mxfp4", (3, 6)),
    ("nvfp4", (2, 5)),
]
UNSEEN = {
    "qwen3": dict(
        model_type="qwen3",
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
    ),
    "gemma2": dict(
        model_type="gemma2",
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
    ),
}
LATER = {  # tried when everything else was settled
    "olmo2": dict(
        model_type="olmo2",
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=48,
    ),
    "granite": dict(
        model_type="granite",
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        logits_scaling=8.0,
        attention_multiplier=0.1,
        embedding_multiplier=12.0,
        residual_multiplier=0.2,
        attention_bias=False,
        mlp_bias=False,
    ),
}
_FEW = [("16", (0, 1, 2)), ("4", (0, 4, 5)), ("nf4", (2,))]
_SHARED = dict(
    hidden_size=384,
    intermediate_size=1024,
    vocab_size=12000,
    rms_norm_eps=1e-6,
    max_position_embeddings=2048,
    rope_theta=10000.0,
    tie_word_embeddings=True,
    torch_dtype="bfloat16",
)


def unseen(name: str):
    """A model with random weights of an architecture that nothing was tuned on."""
    import mlx.core as mx

    module = skeleton({**_SHARED, **(UNSEEN | LATER)[name]})
    mx.eval(module.parameters())
    return module


def rows(name: str, module, pairs):
    """Measure and foresee one model under many settings."""
    forecast = Forecast(module, name, None, True)
    blocks = len({layer.block for layer in forecast.spec.layers} - {None})
    steps = (
        6 if forecast.spec.size < 5e7 else 2
    )  # each stands elsewhere among MLX's tasks, and the worst place counts
    for storage, numbers in pairs:
        plan = QuantPlan(STORAGES[storage]) if STORAGES[storage] else None
        made = run_to_end(quantize(module, forecast.spec, plan, "rtn", {})) if plan else module
        for number in numbers:
            rank, batch, tokens, checkpoint, adapted, chunk = SETTINGS[number]
            adapter = LoRAConfig(rank=rank, num_layers=min(adapted, blocks))
            train = TrainConfig(
                batch_size=batch,
                max_seq_length=tokens,
                grad_checkpoint=checkpoint,
                loss_chunk=chunk,
            )
            setup = Setup(plan, adapter, train)
            peak = max(measured_peak(made, setup) for _ in range(steps))
            found = [
                sum(how(setup)[1].values()) for how in (forecast.by_formula, forecast.by_trace)
            ]
            exact = sum(forecast.inputs(setup).values())
            yield storage, SETTINGS[number], peak, exact, *found


def run(name: str, module, pairs) -> list[tuple[float, ...]]:
    """Print a line a setting; return the errors of formula and trace, and both as a share of what the band covers."""
    errors = []
    for storage, setting, peak, exact, formula, trace in rows(name, module, pairs):
        pair = (formula / peak - 1, trace / peak - 1)
        errors.append((*pair, *((peak - exact) / (found - exact) for found in (formula, trace))))
        rank, batch, tokens, checkpoint, adapted, chunk = setting
        print(
            f"{name:8} {storage:7} r{rank:<3} {batch}×{tokens:<4} {'ckpt' if checkpoint else '    '} layers {adapted:<3} "
            f"chunk {chunk:<4} measured {peak / 1e6:8.1f} MB  formula {100 * pair[0]:+6.2f} %  traced {100 * pair[1]:+6.2f} %",
            flush=True,
        )
    return errors


def summary(title: str, errors: list[tuple[float, ...]]) -> None:
    """Print median, worst and lowest of both levels, and how many peaks were above the band that ``fits`` allows for."""
    table = np.array(errors)
    for level, found, ratio in zip(
        ("formula", "traced"), table.T[:2] * 100, table.T[2:], strict=True
    ):
        print(
            f"{title}: {level:8} n={len(found)} median |error| {np.median(abs(found)):.2f} %, worst {abs(found).max():.2f} %, "
            f"lowest {found.min():+.2f} %, highest {found.max():+.2f} %, more than 1 % low {(found < -1).sum()}, "
            f"above the band {(ratio > SHIPPED['cpu'][1]).sum()}"
        )


def main() -> None:
    """Run all."""
    quick = "quick" in sys.argv
    small = [(storage, [n for n in numbers if n % 2 == 0]) for storage, numbers in PAIRS]
    demo = qlab.load("demo")
    seen = mlx_call(run, "demo", demo.module, PAIRS)
    if not quick:
        model = qlab.load(smollm2())
        seen += mlx_call(run, "SmolLM2", model.module, PAIRS)
    other, later = [], []
    for name in UNSEEN:
        other += mlx_call(lambda name=name: run(name, unseen(name), small))
    for name in LATER:
        later += mlx_call(lambda name=name: run(name, unseen(name), _FEW))
    summary("demo and SmolLM2", seen)
    summary(" and ".join(UNSEEN), other)
    summary(" and ".join(LATER), later)


if __name__ == "__main__":
    main()
