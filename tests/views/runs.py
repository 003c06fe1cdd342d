"""Synthetic runs: what a trainer would tell, without a model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from qlab.core.train.events import Mark
from qlab.core.train.report import RunReport
from qlab.core.panels.trainer import RunState
from qlab.core.train.events import StepEvent
from qlab.core.train.events import SampleGeneration
from qlab.core.train.report import seconds_left
from qlab.core.train.report import summary

REPORT = RunReport(
    name="demo-20260101-120000",
    model="SmolLM2-135M",
    storage="affine 4-bit g64",
    adapter="lora r8",
    status="running",
    steps=0,
    iters=400,
    loss=float("nan"),
    val_loss=float("nan"),
    best_val_loss=float("nan"),
    best_step=0,
    tokens=0,
    tokens_per_second=float("nan"),
    seconds=0.0,
    predicted_nbytes=2_150_000_000,
    peak_nbytes=0,
    path="runs/demo-20260101-120000",
    notes=("the whole graph at once; base: dequantize + matmul",),
)


def events(
    steps: int, every: int | None = 20, seed: int = 0, skipped: tuple[int, ...] = ()
) -> tuple[StepEvent, ...]:
    """Steps of a run that learns; with ``every`` None it has no validation."""
    rng, made, best = np.random.default_rng(seed), [], float("inf")
    for step in range(0 if every else 1, steps + 1):
        level = 2.2 + 1.9 * np.exp(-step / 60) - 0.1 * step / max(steps, 1)
        loss = (
            float("nan")
            if step == 0 or step in skipped
            else level * float(np.exp(0.09 * rng.standard_normal()))
        )
        marks: list[Mark] = []
        val = (
            float(level + 0.08 + 0.02 * rng.standard_normal())
            if every and step % every == 0
            else None
        )
        if val is not None and val < best:
            best = val
            marks.append(Mark("best", f"best so far: validation loss {val:.3f}"))
        if step and step % 100 == 0:
            marks.append(Mark("checkpoint", f"saved step {step}"))
        if step in skipped:
            marks.append(Mark("skipped", "loss was no number: step not applied"))
        if step == 130:
            marks.append(Mark("learning_rate", "learning rate 2e-4 → 1e-4"))
        rate = 2e-4 * min(1.0, (step + 1) / 20) * (0.5 if step > 130 else 1.0)
        tokens = int(900 + 200 * rng.random())
        made.append(
            StepEvent(
                step=step,
                epoch=step / 170,
                loss=loss,
                learning_rate=rate,
                grad_norm=float("nan")
                if step == 0
                else float(0.8 * np.exp(0.4 * rng.standard_normal())),
                targets=tokens // 2,
                tokens=tokens,
                padded=tokens + 30,
                seconds=0.8 * step,
                tokens_per_second=0.0 if step == 0 else tokens / 0.8,
                active_nbytes=int(9.4e8 + 2e7 * rng.random()),
                peak_nbytes=int(1.2e9 + 7e8 * (1 - np.exp(-step / 9))),
                val_loss=val,
                marks=tuple(marks),
            )
        )
    return tuple(made)


GENERATIONS = (
    SampleGeneration(
        0,
        "How do I sort a dict by value?",
        "I am not sure what you mean by that. The dict is a dict, and the dict is a dict of",
    ),
    SampleGeneration(100, "How do I sort a dict by value?", "Use sorted(d.items(), key=...)"),
    SampleGeneration(
        120,
        "How do I sort a dict by value?",
        "Use sorted(d.items(), key=lambda item: item[1]); since Python 3.7 dict() of it keeps the order.",
    ),
)
CODE = "t = qlab.Trainer(a, data, qlab.TrainConfig(iters=400, learning_rate=0.0002))\nt.start()"


def run_state(
    history: tuple[StepEvent, ...] = (), status: str = "running", iters: int = 400, **more
) -> RunState:
    """The state that a trainer would show."""
    notes = more.pop("notes", REPORT.notes)
    report = replace(REPORT, status=status, iters=iters, notes=notes, **summary(history))
    facts = {
        "phase": "training" if status == "running" else "",
        "seconds_left": seconds_left(history, iters) if history else float("nan"),
        "learning_rate": 2e-4,
        "limit_nbytes": 2_600_000_000,
        "active_nbytes": history[-1].active_nbytes if history else 400_000_000,
        "data": "712 prompt rows, 38 held out, 41 210 targets, 6 shapes, 1.03× the real tokens computed",
        "code": CODE,
    }
    return RunState(report=report, history=history, **{**facts, **more})
