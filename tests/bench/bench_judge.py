"""What a judgement costs, and what keeping predictions of the full model loses: demo model, 3 bits, a trained adapter.

    python -m tests.bench.bench_judge

Trains on Python's manual (``pydoc_data.topics``) for a minute, then judges three models by the rows held out. Times are
CPU-seconds of the process, which other work on the machine does not change; with OMP_NUM_THREADS=1 they are a quiet clock's.
"""

from __future__ import annotations

import qlab  # noqa: F401, I001  OpenBLAS before mlx
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

from qlab.lab.adapter import Adapter
from qlab.core.evaluate.judge import COLUMNS
from qlab.core.config.train import TrainConfig
from qlab.engine.adapt.attach import twin_with
from qlab.runtime.job import Job
from qlab.runtime.job import mlx_call
from qlab.engine.evaluate.judge import judge
from qlab.engine.evaluate.teacher import teacher_predictions
from qlab.lab.trainer import Trainer

REPEATS = 3
GOLDEN = [
    {"prompt": f"The {word}", "expected": "statement"}
    for word in ("import", "return", "global", "del")
]


def run(events):
    """Run a generator as a job; return its result and the CPU-seconds that it took."""
    start = time.process_time()
    result = Job(events).start().wait()
    return result, time.process_time() - start


def median(events):
    """Run several times; return the last result and the middle of the times."""
    found = [run(events) for _ in range(REPEATS)]
    return found[-1][0], sorted(seconds for _, seconds in found)[REPEATS // 2]


def main() -> None:
    """Print the card and the table."""
    with tempfile.TemporaryDirectory() as folder:
        model = qlab.load("demo")
        adapter = Adapter(qlab.Quantizer(model, bits=3), rank=8)
        rows = [{"text": text} for _, text in sorted(topics.items())]
        config = TrainConfig(iters=80, batch_size=4, max_seq_length=256, learning_rate=2e-3)
        trainer = Trainer(adapter, rows, config, val=0.2, path=f"{folder}/run")
        trainer.run()
        held, base = trainer.held_out, adapter.base
        teacher, quantized = (
            mlx_call(model.measurements.full_model),
            mlx_call(base.measurements.full_model),
        )
        adapted = mlx_call(twin_with, quantized, base.spec, adapter.config, adapter.parameters)
        students = {COLUMNS[1]: quantized, COLUMNS[2]: adapted}
        exact, seconds = median(lambda: judge(teacher, students, held))
        print(exact)
        print(f"\n{exact.targets} targets in {exact.rows} rows, three models: {seconds:.2f} s\n")
        print(
            "| kept | first pass, s | judging, s | MB | floor, nats | "
            + " | ".join(f"KL, {n}" for n in students)
            + " |"
        )
        print("|" + "---|" * 7)
        print(
            f"| nothing: exact | | {seconds:.2f} | | 0 | "
            + " | ".join(f"{exact[n].kl_nats:.4f}" for n in students)
            + " |"
        )
        for keep in (16, 64, 256, 512, 1024, 2048):
            place = Path(folder) / str(keep)
            kept, first = run(lambda k=keep, at=place: teacher_predictions(teacher, held, k, at))
            report, later = median(lambda k=kept: judge(None, students, held, predictions=k))
            size = sum(f.stat().st_size for f in place.iterdir()) / 1e6
            figures = " | ".join(f"{report[n].kl_nats:.4f}" for n in students)
            print(
                f"| {keep} of {kept.vocabulary} | {first:.2f} | {later:.2f} | {size:.0f} | {kept.floor_nats:.4f} | {figures} |"
            )
        answers, spent = run(
            lambda: judge(
                teacher,
                students,
                tokenizer=model.tokenizer,
                golden=GOLDEN,
                match="contains",
                max_tokens=32,
            )
        )
        print(
            f"\n{answers}\n\n{len(GOLDEN)} prompts × 3 models, up to 32 tokens each: {spent:.2f} s"
        )
        print(*answers.samples[0].texts, sep="\n--\n")


if __name__ == "__main__":
    main()
