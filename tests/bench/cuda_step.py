"""Training on a CUDA card: qlab's loop against mlx-lm's own train step, on llama shapes with random weights.

``python -m tests.bench.cuda_step [1b|8b|4b ...] [seconds]`` prints a line a way: tokens/s (the median step, and how far its
quarter of fast and of slow ones are from it), the ratio to mlx-lm's in the same run, peak memory, share of the card's dense bf16
rate (recomputation counted). Weights are made on the card, a layer at a time; nothing is read or fetched.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time

import qlab  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_unflatten

from qlab.core.config.quant import QuantConfig
from qlab.core.train.rows import Row
from qlab.core.train.rows import Rows
from qlab.core.config.lora import LoRAConfig
from qlab.core.config.train import TrainConfig
from qlab.engine.adapt.parameters import fresh
from qlab.nn.stored import stored_layer
from qlab.engine.data.batches import Feed
from qlab.engine.train.inputs import RunInputs
from qlab.engine.train.setup import prepare_run
from qlab.engine.models.skeleton import describe
from qlab.engine.models.skeleton import skeleton
from qlab.engine.train.loop import train_steps

_LLAMA = dict(
    model_type="llama",
    rms_norm_eps=1e-5,
    rope_theta=5e5,
    max_position_embeddings=8192,
    torch_dtype="bfloat16",
)
SHAPES = {
    "1b": (
        4,
        1024,
        dict(
            hidden_size=2048,
            num_hidden_layers=16,
            intermediate_size=8192,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=64,
            vocab_size=128256,
            tie_word_embeddings=True,
        ),
    ),
    "4b": (
        2,
        512,
        dict(
            hidden_size=2560,
            num_hidden_layers=36,
            intermediate_size=9728,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=151936,
            tie_word_embeddings=True,
        ),
    ),
    "8b": (
        1,
        2048,
        dict(
            hidden_size=4096,
            num_hidden_layers=32,
            intermediate_size=14336,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=128256,
            tie_word_embeddings=False,
        ),
    ),
}
RANK = 16


def random_model(settings: dict, config: QuantConfig | None) -> nn.Module:
    """A model of random weights, quantized as it is made, so that it never exists whole in 16 bits."""
    module = skeleton({**_LLAMA, **settings})
    for path, layer in module.named_modules():
        if isinstance(layer, (nn.Linear, nn.Embedding)):
            layer.weight = (mx.random.normal(layer.weight.shape) * 0.02).astype(mx.bfloat16)
            mx.eval(layer.weight)
            if config:
                kind = "embedding" if isinstance(layer, nn.Embedding) else "linear"
                packed = config.scheme.quantize(layer.weight, config)
                mx.eval(packed)
                made = stored_layer(packed, config, layer.weight.shape, layer.weight.dtype, kind)
                layer.weight = mx.zeros((1, 1))
                module.update_modules(_nested(path, made))
    mx.eval(module.parameters())
    return module


def _nested(path: str, module: nn.Module):
    return tree_unflatten([(path, module)])


def flops(module: nn.Module, settings: dict, batch: int, length: int, again: bool) -> float:
    """Floating-point operations of a step: products of the base forward, back, and again if recomputed; attention too."""
    spec = describe(module, "x")
    inner = sum(x.shape[-2] * x.shape[-1] for x in spec.layers if x.block is not None)
    head = settings["vocab_size"] * settings["hidden_size"]
    tokens, layers, width = (
        batch * length,
        settings["num_hidden_layers"],
        settings["num_attention_heads"] * settings["head_dim"],
    )
    attention = (
        4 * tokens * length * width * layers
    )  # both products, not halved for causality: MLX computes all
    passes = 3 if again else 2
    return 2 * tokens * inner * passes + 2 * tokens * head * 2 + attention * (passes + 1)


def vocabulary(module: nn.Module) -> int:
    """Tokens that the model knows: an index beyond them would write beyond the arrays."""
    return max(x.shape[-2] for x in describe(module, "x").layers if x.block is None)


def random_rows(module: nn.Module, count: int, length: int) -> Rows:
    """Rows of a length, one token longer than what passes the model; the same every time."""
    drawn = (
        np.random.default_rng(0)
        .integers(0, vocabulary(module), (count, length + 1))
        .astype(np.int32)
    )
    mask = np.ones(length + 1, np.uint8)
    mask[0] = 0
    return Rows(tuple(Row(number=n, tokens=tokens, mask=mask) for n, tokens in enumerate(drawn)))


def timed(step, seconds: float) -> tuple[tuple[float, float, float], float, float]:
    """Quartiles of the seconds of a step, seconds of the first, and the highest peak in GB."""
    start = time.perf_counter()
    step()
    first = time.perf_counter() - start
    step()
    mx.clear_cache()
    mx.reset_peak_memory()
    taken, peak, end = [], 0, time.perf_counter() + seconds
    while len(taken) < 5 or time.perf_counter() < end and len(taken) < 30:
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
        peak = max(peak, mx.get_peak_memory())
    fast, median, slow = np.quantile(taken, (0.25, 0.5, 0.75)).tolist()
    return (fast, median, slow), first, peak / 1e9


def stock(module: nn.Module, batch: int, length: int, again: bool):
    """mlx-lm's own train step: its layers, its loss, its checkpoints, compiled as its trainer compiles it."""
    from functools import partial

    from mlx_lm.tuner import trainer
    from mlx_lm.tuner.utils import linear_to_lora_layers

    module.freeze()
    linear_to_lora_layers(
        module, len(module.layers), {"rank": RANK, "scale": 2.0, "dropout": 0.0, "keys": None}
    )
    module.train()
    if again:
        trainer.grad_checkpoint(module.layers[0])
    optimizer = optim.AdamW(1e-5)
    optimizer.init(module.trainable_parameters())
    state = [module.state, optimizer.state, mx.random.state]
    value_and_grad = nn.value_and_grad(module, trainer.default_loss)

    @partial(mx.compile, inputs=state, outputs=state)
    def run(tokens, lengths):
        (loss, count), grad = value_and_grad(module, tokens, lengths)
        optimizer.update(module, grad)
        return loss, count

    tokens = mx.random.randint(0, vocabulary(module), (batch, length + 1))
    lengths = mx.array([[0, length]] * batch)

    def step():
        mx.eval(run(tokens, lengths), state)

    return step


def ours(
    module: nn.Module, batch: int, length: int, how: str, window: int | None, chunk: int = 512
):
    """qlab's training loop as a trainer runs it, but for the files: a call is an optimizer step."""
    spec, lora, again = describe(module, "x"), LoRAConfig(rank=RANK), how == "stepped"
    train = TrainConfig(
        batch_size=batch,
        max_seq_length=length + 1,
        grad_checkpoint=again,
        loss_chunk=chunk,
        window=window or 0,
        iters=10**6,
    )
    parameters = fresh(module, spec, lora, 0)
    feed = Feed(random_rows(module, 64, length), train)
    inputs = RunInputs(
        module=module,
        spec=spec,
        lora=lora,
        config=train,
        feed=feed,
        held_out=None,
        parameters=parameters,
    )
    task, state, notes = prepare_run(inputs, lambda state: None)
    events = train_steps(task, state)
    return lambda: next(events), notes


def rate_of_card(n: int = 8192) -> float:
    """Dense bf16 rate in TFLOP/s."""
    a = mx.random.normal((n, n)).astype(mx.bfloat16)
    mx.eval(a @ a)
    start = time.perf_counter()
    for _ in range(20):
        b = a @ a
        mx.eval(b)
    return 20 * 2 * n**3 / (time.perf_counter() - start) / 1e12


def ways(name: str) -> list[tuple[str, QuantConfig | None, str, object]]:
    """Title, storage, how, and window or checkpoints, of every row; the first is what the others are compared with."""
    four, nf4 = QuantConfig("affine", 4), QuantConfig("nf4_dq")
    rows: list[tuple[str, QuantConfig | None, str, object]] = [
        ("mlx-lm, checkpoints", four, "stock", True)
    ]
    rows += [(f"stepped, window {w}", four, "stepped", w) for w in (1, 2, 4)]
    rows += [("nf4_dq stepped, window 2", nf4, "stepped", 2)]
    rows += [(f"16-bit stepped, window {w}", None, "stepped", w) for w in (2, 4)]
    if name == "4b":
        rows += [("the least: chunks of 128", four, "least", 1)]
    return rows + [("mlx-lm", four, "stock", False), ("whole", four, "whole", None)] * (
        name == "1b"
    )


def row(name: str, number: int, seconds: float) -> None:
    """Run one way and print its line."""
    title, config, how, extra = ways(name)[number]
    batch, length, settings = SHAPES[name]
    peak = rate_of_card()
    module, notes = random_model(settings, config), ()
    work = flops(module, settings, batch, length, how in ("stepped", "least") or extra is True)
    if how == "stock":
        run = stock(module, batch, length, bool(extra))
    else:
        stepped, chunk = ("stepped", 128) if how == "least" else (how, 512)
        run, notes = ours(module, batch, length, stepped, extra, chunk)  # type: ignore
    del module
    (fast, median, slow), first, gb = timed(run, seconds)
    print(
        f"{name} {batch}×{length} {title:26} {batch * length / median:9.0f} tokens/s "
        f"({100 * (median / slow - 1):+.1f} {100 * (median / fast - 1):+.1f} %)  peak {gb:6.2f} GB  "
        f"MFU {100 * work / median / peak / 1e12:5.1f} % of {peak:.0f} TFLOP/s  first step {first:6.1f} s  {'; '.join(notes)}",
        flush=True,
    )


def main() -> None:
    """Run what the command line names, each row in a process of its own: one that fails does not end the table."""
    if sys.argv[1:2] == ["row"]:
        row(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
        return
    names = [x for x in sys.argv[1:] if x in SHAPES] or ["1b", "8b", "4b"]
    seconds = next((x for x in sys.argv[1:] if x.replace(".", "").isdigit()), "3")
    for name in names:
        stock = 0.0
        for number, (title, *_) in enumerate(ways(name)):
            command = [
                sys.executable,
                "-m",
                "tests.bench.cuda_step",
                "row",
                name,
                str(number),
                seconds,
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            line = done.stdout.strip() or f"{name} {title}: {done.stderr.strip()[-300:]}"
            found = re.search(r"([\d.]+) tokens/s", done.stdout)
            rate = float(found[1]) if found else 0.0
            stock = stock or rate * (number == 0)
            print(f"{rate / stock:5.2f} × mlx-lm  {line}" if stock and rate else line, flush=True)


if __name__ == "__main__":
    main()
