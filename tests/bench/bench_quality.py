"""Quality on SmolLM2-135M: does the predicted ΔKL rank layers, and what does the searched solver buy?

    python -m tests.bench.bench_quality

The weights are taken off their Q4_1 grid first (``degrid``); the embedding stays at 16 bits; all text is held out.
"""

from __future__ import annotations

import qlab  # noqa: F401, I001  OpenBLAS before mlx
import numpy as np

from qlab.core.config.quant import QuantConfig
from qlab.core.config.quant import QuantPlan
from qlab.runtime.job import Job
from qlab.runtime.job import mlx_call
from qlab.lab.model import load
from tests.bench.degrid import degrid
from tests.models import smollm2

EVERY = 4  # one layer in four is judged alone


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks of distinct values."""
    return np.argsort(np.argsort(values)).astype(float)


def main() -> None:
    """Print the tables."""
    model = load(smollm2())
    mlx_call(degrid, model.module)
    measured = model.measurements
    Job(lambda: measured.sample(QuantConfig("affine", 3, 64))).start().wait()
    Job(lambda: measured.predict()).start().wait()
    kept = {"model.embed_tokens": None}
    plan = QuantPlan(QuantConfig("affine", 3, 64), kept)
    paths = [layer.path for layer in model.spec.layers if layer.kind == "linear"][::EVERY]
    columns = [i for i, layer in enumerate(model.spec.layers) if layer.path in paths]
    true = Job(lambda: measured.evaluate_layers(paths, plan)).start().wait()
    measured = np.array([true[path] for path in paths])
    row = measured.table.row(plan.default)
    for name in ("kl_nats", "relative_error"):
        shown = measured.table.measure(name)[row, columns]
        rank = np.corrcoef(ranks(shown), ranks(measured))[0, 1]
        print(
            f"{name:16s} rank correlation with the true single-layer KL, {len(paths)} layers at 3 bits: {rank:.3f}"
        )
        if name == "kl_nats":
            print(
                f"{'':16s} median predicted/true {np.median(shown / measured):.2f}, sum {shown.sum() / measured.sum():.2f}"
            )
    for bits in (4, 3):
        found = {}
        for solver in ("rtn", "searched"):
            wanted = QuantPlan(QuantConfig("affine", bits, 64), kept)
            report = Job(lambda w=wanted, s=solver: measured.evaluate(w, s)).start().wait()
            found[solver] = report.kl_nats
            print(
                f"{bits}-bit g64 {solver:9s} KL {report.kl_nats:.3f} ± {report.kl_nats_se:.3f} nats/token, "
                f"perplexity {report.perplexity:.2f} (16-bit {report.perplexity_before:.2f})",
                flush=True,
            )
        print(f"{bits}-bit g64 searched/rtn {found['searched'] / found['rtn']:.3f}", flush=True)


if __name__ == "__main__":
    main()
