"""What the starts of an adapter buy before the first step, on SmolLM2-135M: true KL to the 16-bit model on held-out text.

    python -m tests.bench.bench_start

The weights are taken off their Q4_1 grid first (``degrid``); the embedding stays at 16 bits; rank 16 on all linear layers
within the blocks; starts are computed from 2048 tokens of other text.
"""

from __future__ import annotations

import qlab  # noqa: F401, I001  OpenBLAS before mlx
import time

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from qlab.core.config.quant import QuantConfig
from qlab.core.config.quant import QuantPlan
from qlab.core.config.lora import LoRAConfig
from qlab.engine.evaluate.divergence import compare_on_text
from qlab.engine.quantize.quantize import quantize
from qlab.engine.adapt.activations import passing
from qlab.engine.adapt.activations import texts
from qlab.runtime.job import Job
from qlab.runtime.job import mlx_call
from qlab.nn.linear import weight_of
from qlab.engine.adapt.init import STARTS
from qlab.engine.adapt.init import recovery
from qlab.engine.adapt.init import start
from qlab.nn.frozen import Compute
from qlab.engine.adapt.attach import attach
from qlab.engine.models.surgery import module_at
from qlab.lab.model import load
from tests.bench.degrid import degrid
from tests.models import smollm2

RANK = 16
EVERY = 7  # one layer in seven is asked how much of its output error each start recovers


def run(events):
    """Run a generator as a job; return its result."""
    return Job(lambda: events).start().wait()


def main(bits_tried: tuple[int, ...] = (4, 3)) -> None:
    """Print the tables."""
    model = load(smollm2())
    mlx_call(degrid, model.module)
    full = mlx_call(model.measurements.full_model)
    seen, heldout = mlx_call(texts, model.tokenizer, None)
    layers = LoRAConfig(rank=RANK).targets(model.spec)
    paths = [layer.path for layer in layers]

    def original(path: str) -> mx.array:
        return weight_of(module_at(model.module, path))

    for bits in bits_tried:
        plan = QuantPlan(QuantConfig("affine", bits, 64), {"model.embed_tokens": None})
        small = run(quantize(model.module, model.spec, plan, "rtn", {}))

        def stored(path: str, small=small) -> mx.array:
            return weight_of(module_at(small, path))

        for init in ("default", *STARTS):
            began = time.perf_counter()
            lora = LoRAConfig(rank=RANK, init=init)

            def student(lora=lora, small=small, stored=stored):
                made = attach(small, model.spec, lora, Compute(mx.float32, True), False)
                if lora.init != "default":
                    groups = passing(full, paths, seen, heldout) if lora.init != "residual" else []
                    arrays = yield from start(lora, layers, original, stored, groups)
                    made.update(tree_unflatten(list(arrays.items())))
                report = yield from compare_on_text(full, made, heldout)
                return report

            report = run(student())
            print(
                f"{bits}-bit g64 rank {RANK} {init:9s} KL {report.kl_nats:.3f} ± {report.kl_nats_se:.3f} nats/token, "
                f"perplexity {report.perplexity:.2f} (16-bit {report.perplexity_before:.2f}), {time.perf_counter() - began:.0f} s",
                flush=True,
            )

        def judged(stored=stored):
            found = [
                recovery(path, original, stored, group[path])
                for group in passing(full, paths[::EVERY], seen, heldout)
                for path in group
            ]
            return found
            yield

        found = run(judged())
        print(
            f"{bits}-bit share of the squared error that rank {RANK} recovers, median of {len(found)} layers: "
            f"of the weights {np.median([x.share(RANK) for x in found]):.3f} "
            f"(noise alone {np.median([np.interp(RANK, *noise(x)) for x in found]):.3f}); of the output on held-out text "
            + ", ".join(
                f"{init} {np.median([x.share(RANK, init) for x in found]):.3f}" for init in STARTS
            ),
            flush=True,
        )


def noise(found):
    """Ranks and shares that white noise of the same shape would give."""
    from qlab.core.adapt.recovery import GRID

    known = np.isfinite(found.noise_weight)
    return np.array(GRID)[known], found.noise_weight[known]


if __name__ == "__main__":
    main()
