"""Trains the model that ``qlab.load("demo")`` opens: a small llama, from scratch, on Jane Austen's novels.

Step 1 (once; needs the package ``rdata``) takes the novels out of Debian's package ``r-cran-janeaustenr``:

    apt-get download r-cran-janeaustenr && dpkg-deb -x r-cran-janeaustenr_*.deb austen
    python docs/demo/train_demo.py novels austen/usr/lib/R/site-library/janeaustenr/data build/novels

Step 2 trains (minutes on a GPU, hours on a CPU) and writes the model folder:

    python docs/demo/train_demo.py train build/novels build/demo --seed 0

*Persuasion* is held out: it is neither seen by the tokenizer nor by the model, and its loss picks the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
import zlib
from pathlib import Path

import numpy as np

HELD_OUT = "persuasion"
END = "<|endoftext|>"
SHAPE = dict(
    model_type="llama",
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
    architectures=["LlamaForCausalLM"],
    torch_dtype="bfloat16",
)


def novels(data: Path, out: Path) -> None:
    """Write each novel as text; ``data`` holds R's lazy-load database (Rdata.rdx and Rdata.rdb)."""
    import rdata

    def read(blob: bytes):
        return rdata.conversion.convert(
            rdata.parser.parse_data(zlib.decompress(blob, 47))
        )  # 47: gzip or zlib

    out.mkdir(parents=True, exist_ok=True)
    index = read((data / "Rdata.rdx").read_bytes())
    database = (data / "Rdata.rdb").read_bytes()
    for name, (offset, length) in index["variables"].items():
        lines = read(database[offset + 4 : offset + length])
        (out / f"{name}.txt").write_text(paragraphs([str(line) for line in lines]))


def paragraphs(lines: list[str]) -> str:
    """Join wrapped lines into paragraphs; drop title, chapter headings and emphasis marks."""
    blocks = re.split(r"\n\s*\n", "\n".join(line.rstrip() for line in lines))
    joined = [re.sub(r"\s+", " ", block).strip().replace("_", "") for block in blocks]
    prose = [
        b
        for b in joined
        if len(b) > 40 and not re.match(r"(?i)(chapter|volume|by jane|finis|the end)\b", b)
    ]
    return "\n\n".join(prose) + "\n"


def make_tokenizer(texts: list[str]):
    """Byte-level BPE of 2048 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2048, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    return made


def build(dropout: float):
    """The llama of mlx-lm, with dropout on what each half-block adds (training only)."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.models import llama

    class Block(llama.TransformerBlock):
        def __call__(self, x, mask=None, cache=None):
            drop = self._drop
            h = x + drop(self.self_attn(self.input_layernorm(x), mask, cache))
            return h + drop(self.mlp(self.post_attention_layernorm(h)))

    model = llama.Model(llama.ModelArgs.from_dict(SHAPE))
    for block in model.model.layers:
        block.__class__ = Block
        object.__setattr__(block, "_drop", nn.Dropout(dropout))
        for name in ("o_proj", "down_proj"):  # residual branches start small, as in GPT-2
            layer = block.self_attn[name] if name == "o_proj" else block.mlp[name]
            layer.weight = layer.weight / math.sqrt(2 * SHAPE["num_hidden_layers"])
    model.model.embed_tokens.weight = model.model.embed_tokens.weight * (
        0.02 * math.sqrt(SHAPE["hidden_size"])
    )
    mx.eval(model.parameters())
    return model


def held_out_loss(model, tokens: np.ndarray, length: int = 256) -> float:
    """Mean negative log-likelihood in nats per token, windows of ``length``."""
    import mlx.core as mx
    import mlx.nn as nn

    rows = (len(tokens) - 1) // length
    x = tokens[: rows * length].reshape(rows, length)
    y = tokens[1 : rows * length + 1].reshape(rows, length)
    total = 0.0
    for i in range(0, rows, 64):
        logits = model(mx.array(x[i : i + 64])).astype(mx.float32)
        total += nn.losses.cross_entropy(logits, mx.array(y[i : i + 64]), reduction="sum").item()
    return total / (rows * length)


def train(folder: Path, out: Path, args: argparse.Namespace) -> None:
    """Train with AdamW, cosine schedule, dropout and BPE dropout; keep the average of weights that validates best."""
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim
    from mlx.utils import tree_map

    texts = {path.stem: path.read_text() for path in sorted(folder.glob("*.txt"))}
    seen = [text for name, text in texts.items() if name != HELD_OUT]
    tokenizer = make_tokenizer(seen)
    held = np.array(tokenizer.encode(texts[HELD_OUT]).ids, np.int32)
    rng = np.random.default_rng(args.seed)
    mx.random.seed(args.seed)
    variants = [encode_all(tokenizer, seen, None)]
    variants += [encode_all(tokenizer, seen, args.bpe_dropout) for _ in range(args.variants)]
    model = build(args.dropout)
    average = tree_map(lambda a: mx.array(a), model.parameters())
    schedule = optim.join_schedules(
        [
            optim.linear_schedule(0, args.lr, 200),
            optim.cosine_decay(args.lr, args.steps - 200, args.lr * 0.02),
        ],
        [200],
    )
    optimizer = optim.AdamW(schedule, betas=[0.9, 0.95], weight_decay=args.weight_decay)
    optimizer.init(model.trainable_parameters())

    def loss(x, y):
        return nn.losses.cross_entropy(model(x).astype(mx.float32), y, reduction="mean")

    grad = nn.value_and_grad(model, loss)
    state = [model.state, optimizer.state, mx.random.state]

    def step(x, y, average):
        value, gradients = grad(x, y)
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        optimizer.update(model, gradients)
        average = tree_map(lambda a, p: a + (1 - args.decay) * (p - a), average, model.parameters())
        return value, average

    step = mx.compile(step, inputs=state, outputs=state)
    best, start = math.inf, time.perf_counter()
    for i in range(1, args.steps + 1):
        tokens = variants[rng.integers(len(variants))]
        at = rng.integers(0, len(tokens) - args.length - 1, args.batch)[:, None] + np.arange(
            args.length + 1
        )
        rows = mx.array(tokens[at])
        value, average = step(rows[:, :-1], rows[:, 1:], average)
        mx.eval(value, average, state)
        if i % args.every == 0 or i == args.steps:
            trained = tree_map(lambda a: a, model.parameters())
            model.update(average)
            model.eval()
            now = held_out_loss(model, held)
            if now < best:
                best = now
                save(model, tokenizer, out)
            model.update(trained)
            model.train()
            print(
                f"step {i} train {value.item():.3f} held-out {now:.4f} best {best:.4f} {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    characters = len(texts[HELD_OUT]) / len(held)
    print(
        json.dumps(
            {
                "nats_per_token": best,
                "perplexity": math.exp(best),
                "bits_per_character": best / math.log(2) / characters,
            }
        )
    )


def encode_all(tokenizer, texts: list[str], dropout: float | None) -> np.ndarray:
    """Token ids of all novels; with BPE dropout each call cuts the words differently (arXiv:1910.13267)."""
    tokenizer.model.dropout = dropout
    ids = [i for text in texts for i in [0, *tokenizer.encode(text).ids]]
    tokenizer.model.dropout = None
    return np.array(ids, np.int32)


def save(model, tokenizer, out: Path) -> None:
    """Write config, weights in bfloat16 and tokenizer as mlx-lm and transformers read them."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    out.mkdir(parents=True, exist_ok=True)
    weights = {name: value.astype(mx.bfloat16) for name, value in tree_flatten(model.parameters())}
    mx.save_safetensors(str(out / "model.safetensors"), weights, metadata={"format": "mlx"})
    (out / "config.json").write_text(json.dumps(SHAPE, indent=2, sort_keys=True) + "\n")
    tokenizer.save(str(out / "tokenizer.json"))
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END}
    (out / "tokenizer_config.json").write_text(json.dumps(facts, indent=2) + "\n")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["novels", "train"])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--weight-decay", type=float, default=1.0)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--bpe-dropout", type=float, default=0.03)
    parser.add_argument("--variants", type=int, default=12)
    parser.add_argument("--decay", type=float, default=0.995)
    parser.add_argument("--every", type=int, default=100)
    args = parser.parse_args()
    if args.what == "novels":
        novels(args.source, args.out)
    else:
        train(args.source, args.out, args)


if __name__ == "__main__":
    main()
