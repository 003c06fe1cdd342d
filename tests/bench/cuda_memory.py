"""Foreseen memory against measured on a CUDA card: steps of 1B, 4B and 8B shapes with random 4-bit weights.

``python -m tests.bench.cuda_memory [tiny|1b|4b|8b ...] [--save FILE]`` prints a line a setting (measured, traced, formula; the loss
in chunks and at once) and a summary; the table is in docs/guide/memory_accuracy.md. Weights are made on the card, a layer at a
time: nothing is read or fetched.
``--save`` keeps the graphs, so that work in flight can be studied where there is no card. ``tiny`` is for trying it out.
"""

from __future__ import annotations

import lzma
import pickle
import sys
import time
from statistics import median

import qlab

import mlx.core as mx
import mlx.nn as nn

from qlab.core.config.quant import QuantConfig
from qlab.core.memory.setup import Setup
from qlab.core.config.lora import LoRAConfig
from qlab.core.config.train import TrainConfig
from qlab.runtime.device import backend
from qlab.engine.memory.forecast import Forecast
from qlab.engine.memory.measure import measured_peak
from qlab.runtime.job import mlx_call
from qlab.engine.models.skeleton import describe
from qlab.engine.models.skeleton import skeleton
from qlab.engine.models.surgery import map_layers
from qlab.engine.models.lazy_storage import stored
from qlab.errors import UnsupportedError

_LLAMA = dict(
    model_type="llama",
    rms_norm_eps=1e-5,
    rope_theta=5e5,
    max_position_embeddings=8192,
    torch_dtype="bfloat16",
    num_attention_heads=32,
    num_key_value_heads=8,
)
SHAPES = {
    "tiny": dict(
        hidden_size=256,
        num_hidden_layers=6,
        intermediate_size=512,
        head_dim=8,
        vocab_size=2048,
        tie_word_embeddings=True,
    ),
    "1b": dict(
        hidden_size=2048,
        num_hidden_layers=16,
        intermediate_size=8192,
        head_dim=64,
        vocab_size=128256,
        tie_word_embeddings=True,
    ),
    "4b": dict(
        model_type="qwen3",
        hidden_size=2560,
        num_hidden_layers=36,
        intermediate_size=9728,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "8b": dict(
        hidden_size=4096,
        num_hidden_layers=32,
        intermediate_size=14336,
        head_dim=128,
        vocab_size=128256,
        tie_word_embeddings=False,
    ),
}
# batch, tokens, checkpoints, chunk of the loss (0: at once)
SETTINGS = {
    "tiny": [(2, 128, True, 64), (2, 128, False, 64), (2, 128, True, 0), (2, 128, False, 0)],
    "1b": [(4, 1024, True, 512), (4, 1024, False, 512), (1, 512, True, 0), (1, 512, False, 0)],
    "4b": [(2, 512, True, 512), (1, 512, False, 512), (1, 2048, True, 512), (1, 512, True, 0)],
    "8b": [(1, 2048, True, 512), (4, 1024, True, 512), (1, 512, False, 512), (1, 512, True, 0)],
}
RANK = 16


def random_model(settings: dict) -> nn.Module:
    """A model stored at 4 bits, random, made a layer at a time; nothing of it ever exists in 16 bits."""
    module = skeleton({**_LLAMA, **settings})
    layers = [x for x in describe(module, "").layers if x.refusal(QuantConfig()) is None]
    module = stored(module, {x.path: QuantConfig() for x in layers})

    def fill(path: str, layer: nn.Module) -> nn.Module:
        layer["weight"] = mx.random.randint(0, 2**31 - 1, layer["weight"].shape).astype(mx.uint32)
        for part, value in (("scales", 4e-3), ("biases", -0.03)):
            layer[part] = mx.full(layer[part].shape, value, mx.bfloat16)
        mx.eval(layer.parameters())
        return layer

    module = map_layers(module, [x.path for x in layers], fill)
    mx.eval(module.parameters())
    return module


def rows(name: str, graphs: dict):
    """Measure and foresee one shape."""
    module = random_model(SHAPES[name])
    forecast = Forecast(module, name, None, True)
    for batch, tokens, checkpoint, chunk in SETTINGS[name]:
        train = TrainConfig(
            batch_size=batch,
            max_seq_length=tokens + 1,
            grad_checkpoint=checkpoint,
            loss_chunk=chunk,
        )
        setup = Setup(None, LoRAConfig(rank=min(RANK, 8) if name == "tiny" else RANK), train)
        start = time.perf_counter()
        peak = max(
            measured_peak(module, setup) for _ in range(3)
        )  # the host is not always as far ahead as it can be
        taken = time.perf_counter() - start
        graphs[name, batch, tokens, checkpoint, chunk] = (peak, None)
        try:
            graphs[name, batch, tokens, checkpoint, chunk] = (peak, forecast.graph(setup))
            traced, formula = (
                sum(how(setup)[1].values()) for how in (forecast.by_trace, forecast.by_formula)
            )
        except UnsupportedError as error:
            traced = formula = 0
            print(error, flush=True)
        yield batch, tokens, checkpoint, chunk, peak, traced, formula, taken
        mx.clear_cache()


def show(name: str, graphs: dict) -> list[tuple[float, float]]:
    """Print a shape's lines; return the errors of trace and formula."""
    errors = []
    for batch, tokens, checkpoint, chunk, peak, traced, formula, taken in rows(name, graphs):
        off = traced / peak - 1, formula / peak - 1
        print(
            f"{name:5} {batch}×{tokens:<5} {'stepped' if checkpoint else 'whole':8} chunk {chunk or 'none':<5} "
            f"measured {peak / 1e9:7.3f} GB  traced {traced / 1e9:7.3f} ({100 * off[0]:+6.1f} %)  "
            f"formula {formula / 1e9:7.3f} ({100 * off[1]:+6.1f} %)  {taken:.0f} s",
            flush=True,
        )
        errors += [off] if traced else []
    return errors


def main() -> None:
    """Run what is named, or all but ``tiny``; a shape that fails does not end the others."""
    words = sys.argv[1:]
    file = words[words.index("--save") + 1] if "--save" in words else None
    names = [word for word in words if word in SHAPES] or [
        name for name in SHAPES if name != "tiny"
    ]
    info = mlx_call(lambda: mx.device_info() if backend() != "cpu" else {})
    print(
        f"{mlx_call(backend)} {info.get('device_name', '')}, mlx {mx.__version__}, qlab {qlab.__version__}",
        flush=True,
    )
    graphs: dict = {}
    errors: list[tuple[float, float]] = []
    for name in names:
        try:
            errors += mlx_call(show, name, graphs)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
        if file:
            with lzma.open(file, "wb", preset=1) as out:
                pickle.dump(graphs, out)
    for level, found in zip(("traced", "formula"), zip(*errors, strict=True), strict=False):
        off = [100 * error for error in found]
        print(
            f"{level:8} n={len(off)} median |error| {median(map(abs, off)):.1f} %, lowest {min(off):+.1f} %, highest {max(off):+.1f} %"
        )


if __name__ == "__main__":
    main()
