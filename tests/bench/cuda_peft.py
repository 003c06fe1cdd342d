"""The same training on the same card by PEFT and bitsandbytes: NF4 with double quantization, paged 8-bit AdamW, checkpoints.

``python -m tests.bench.cuda_peft [1b|8b|4b] [16]`` prints a line as ``tests.bench.cuda_step`` does; ``16`` leaves the base in
bfloat16. Needs torch, transformers, peft and bitsandbytes, none of which qlab needs. Weights are random, made on the card.
"""

from __future__ import annotations

import sys
import time

import torch

from tests.bench.cuda_step import RANK, SHAPES


def model(settings: dict, quantized: bool):
    """A llama with adapters on every linear layer of its blocks, as PEFT's and bitsandbytes' guides have it."""
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **settings, rms_norm_eps=1e-5, max_position_embeddings=8192, attn_implementation="sdpa"
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        made = LlamaForCausalLM(config)
    names = [
        name
        for name, layer in made.named_modules()
        if isinstance(layer, torch.nn.Linear) and "lm_head" not in name
    ]
    for name in names if quantized else ():
        parent, _, leaf = name.rpartition(".")
        layer = made.get_submodule(name)
        new = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=False,
            compute_dtype=torch.bfloat16,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        new.weight = bnb.nn.Params4bit(
            layer.weight.data.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4"
        )
        setattr(made.get_submodule(parent), leaf, new.to("cuda"))
    for parameter in made.parameters():
        parameter.requires_grad = False
    made.config.use_cache = False
    made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    made.enable_input_require_grads()
    targets = sorted({name.rpartition(".")[2] for name in names})
    made = get_peft_model(
        made, LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=targets)
    )
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return made, bnb.optim.PagedAdamW8bit(
        [p for p in made.parameters() if p.requires_grad], lr=1e-5
    )


def main() -> None:
    """Time one shape."""
    name, quantized = sys.argv[1], "16" not in sys.argv[2:]
    batch, length, settings = SHAPES[name]
    made, optimizer = model(settings, quantized)
    made.train()
    tokens = torch.randint(0, settings["vocab_size"], (batch, length), device="cuda")

    def step() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            made(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in made.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()

    for _ in range(3):
        step()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    taken = []
    for _ in range(8):
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    what = "PEFT + bitsandbytes nf4_dq" if quantized else "PEFT, 16-bit"
    print(
        f"{name} {batch}×{length} {what:26} {batch * length / sorted(taken)[4]:9.0f} tokens/s  "
        f"peak {torch.cuda.max_memory_allocated() / 1e9:6.2f} GB allocated, {torch.cuda.max_memory_reserved() / 1e9:.2f} reserved"
    )


if __name__ == "__main__":
    main()
