"""Takes a llama's weights off the grid that they were stored on, without changing what it computes.

SmolLM2 comes as Q4_1, so its weights lie on a 4-bit grid and quantizing them again would look too easy. Channel scales
that cancel (norm against the columns that follow, value rows against output columns, up rows against down columns) move
every weight off the grid and leave the logits as they were.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


def degrid(module: nn.Module, seed: int = 0, dtype: mx.Dtype = mx.bfloat16) -> None:
    """Rescale the channels of an mlx-lm llama in place by factors from 0.8 to 1.25.

    Args:
        module: the model, dense.
        seed: of the factors.
        dtype: of the result.
    """
    keys = iter(mx.random.split(mx.random.key(seed), 4 * len(module.layers)))

    def factors(n: int) -> mx.array:
        return mx.exp(mx.random.uniform(-0.223, 0.223, (n,), key=next(keys)))

    def scale(
        layer: nn.Module, rows: mx.array | None = None, columns: mx.array | None = None
    ) -> None:
        weight = layer.weight.astype(mx.float32)
        weight = weight if rows is None else weight * rows[:, None]
        layer.weight = (weight if columns is None else weight * columns).astype(dtype)

    def norm(layer: nn.Module, s: mx.array) -> None:
        layer.weight = layer.weight.astype(mx.float32) / s

    for block in module.layers:
        attention, mlp = block.self_attn, block.mlp
        hidden = block.input_layernorm.weight.shape[0]
        repeats = attention.n_heads // attention.n_kv_heads
        s, v = factors(hidden), factors(attention.v_proj.weight.shape[0])
        norm(block.input_layernorm, s)
        scale(attention.q_proj, columns=s)
        scale(attention.k_proj, columns=s)
        scale(attention.v_proj, rows=v, columns=s)
        per_head = v.reshape(attention.n_kv_heads, 1, -1)
        scale(attention.o_proj, columns=1 / mx.repeat(per_head, repeats, axis=1).reshape(-1))
        s, up = factors(hidden), factors(mlp.up_proj.weight.shape[0])
        norm(block.post_attention_layernorm, s)
        scale(mlp.gate_proj, columns=s)
        scale(mlp.up_proj, rows=up, columns=s)
        scale(mlp.down_proj, columns=1 / up)
    mx.eval(module.parameters())
