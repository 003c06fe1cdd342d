"""The training step on this machine against mlx-lm's own ``train``: SmolLM2-135M, 4 bits in groups of 64, LoRA rank 8.

``python -m tests.bench.bench_step [batch] [tokens]`` prints tokens/s, peak memory, the loss of the first step and ratios.
mlx-lm runs in a process that never sees qlab: once as its own instructions install it, once with OpenBLAS preloaded.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path("build/bench/smollm2-4bit")
RANK = 8
STEPS = {"stock": 2, "stock, OpenBLAS": 2, "whole": 4, "stepped": 4}


def rows(count: int, length: int) -> list[list[int]]:
    """Rows of the same length, always the same ones."""
    import numpy as np

    return np.random.default_rng(0).integers(0, 40000, (count, length)).tolist()


def prepare() -> None:
    """Write the quantized model as a folder that mlx-lm opens."""
    import qlab
    from tests.models import smollm2

    qlab.Quantizer(qlab.load(smollm2()), bits=4, group_size=64).quantize().save(FOLDER)


def stock(batch: int, length: int, steps: int) -> dict:
    """mlx-lm's ``train``, with a callback that reads its own report."""
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx_lm import load
    from mlx_lm.tuner.trainer import TrainingArgs, train
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model, _ = load(str(FOLDER))
    model.freeze()
    linear_to_lora_layers(
        model, len(model.layers), {"rank": RANK, "scale": 2.0, "dropout": 0.0, "keys": None}
    )
    model.train()
    data = [(row, 0) for row in rows(batch, length)]
    found: list[dict] = []

    class Callback:
        def on_train_loss_report(self, info):
            found.append(info)

        def on_val_loss_report(self, info):
            pass

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArgs(
            batch_size=batch,
            iters=steps,
            steps_per_report=1,
            steps_per_eval=10**6,
            steps_per_save=10**6,
            max_seq_length=length,
            adapter_file=f"{folder}/a.safetensors",
        )
        train(model, optim.AdamW(1e-5), data, None, args, training_callback=Callback())
    seconds = [batch * (length - 1) / info["tokens_per_second"] for info in found]
    return {"seconds": seconds, "loss": found[0]["train_loss"], "peak": mx.get_peak_memory()}


def ours(how: str, batch: int, length: int, steps: int) -> dict:
    """qlab's step and update, as the trainer makes them."""
    import time

    import qlab
    from qlab.core.config.lora import LoRAConfig
    from qlab.core.config.train import TrainConfig
    from qlab.runtime.job import mlx_call

    model = qlab.load(str(FOLDER))

    def run() -> dict:
        import mlx.core as mx

        from qlab.engine.models.skeleton import describe
        from qlab.engine.adapt.attach import attach
        from qlab.engine.step.choose import make_step
        from qlab.engine.step.protocol import StepBatch
        from qlab.engine.step.product_trial import choose_compute
        from qlab.engine.train.update import Update

        spec, lora, again = describe(model.module, "x"), LoRAConfig(rank=RANK), how == "stepped"
        train = TrainConfig(
            batch_size=batch, max_seq_length=length, grad_checkpoint=again, learning_rate=1e-5
        )
        compute, notes = choose_compute(model.module, spec, batch * (length - 1))
        step = make_step(attach(model.module, spec, lora, compute, again), train, how=how)
        update = Update(train, step.parameters)
        parameters, state = step.parameters, update.state
        tokens = mx.array(rows(batch, length))
        mask, seconds, losses = mx.ones(tokens.shape, mx.int32), [], []
        mx.eval(parameters, state)
        mx.reset_peak_memory()
        for _ in range(steps):
            start = time.perf_counter()
            sums = update.gather(step(parameters, StepBatch(tokens, mask)))
            mx.eval(sums)
            new = update(parameters, state, sums, mx.array(1e-5))
            mx.eval(new)
            seconds.append(time.perf_counter() - start)
            parameters, state = new.parameters, new.state
            losses.append(new.loss.item())
        notes = [*step.notes, *notes, f"{step.traces} traces"]
        return {"seconds": seconds, "loss": losses[0], "peak": mx.get_peak_memory(), "notes": notes}

    return mlx_call(run)


def main() -> None:
    """Run all ways one after the other."""
    if sys.argv[1:2] == ["prepare"]:
        prepare()
        return
    if sys.argv[1:2] == ["one"]:
        way, batch, length, steps = sys.argv[2], *map(int, sys.argv[3:6])
        if way == "stock, OpenBLAS":
            from qlab.runtime import blas

            blas.preload()
        made = (
            stock(batch, length, steps)
            if way.startswith("stock")
            else ours(way, batch, length, steps)
        )
        print("\nRESULT " + json.dumps(made))
        return
    batch, length = map(int, sys.argv[1:3]) if len(sys.argv) > 2 else (1, 64)
    if not (FOLDER / "config.json").exists():
        FOLDER.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [sys.executable, "-m", "tests.bench.bench_step", "prepare"], check=True
        )  # takes its memory with it
    speed: dict[str, float] = {}
    for way, steps in STEPS.items():
        command = [
            sys.executable,
            "-m",
            "tests.bench.bench_step",
            "one",
            way,
            str(batch),
            str(length + 1),
            str(steps),
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
        )
        line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
        if line is None:
            print(f"{way}: {done.stderr.strip()[-300:]}", flush=True)
            continue
        made = json.loads(line[7:])
        seconds = made["seconds"][1:] or made["seconds"]  # the first step compiles
        speed[way] = batch * length / statistics.median(seconds)
        ratios = "  ".join(
            f"{speed[way] / speed[x]:5.1f} × {x}"
            for x in ("stock", "stock, OpenBLAS")
            if x in speed
        )
        print(
            f"{way:16} {batch}×{length}  {speed[way]:8.1f} tokens/s ({min(seconds):.2f} to {max(seconds):.2f} s a step)  "
            f"peak {made['peak'] / 1e6:6.0f} MB  first loss {made['loss']:.4f}  {ratios}  {'; '.join(made.get('notes', []))}",
            flush=True,
        )


if __name__ == "__main__":
    main()
