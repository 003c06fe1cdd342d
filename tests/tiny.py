"""Tiny models with random weights, and a way to run a test on the one thread that MLX belongs to."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qlab.core.config.quant import QuantConfig
from qlab.core.config.quant import QuantPlan
from qlab.core.config.spec import ModelSpec
from qlab.engine.quantize.quantize import quantize
from qlab.runtime.job import mlx_call
from qlab.engine.models.skeleton import describe
from qlab.engine.models.skeleton import skeleton
from qlab.engine.models.surgery import module_at

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "vocab_size": 97,
    "tie_word_embeddings": False,
    "rope_theta": 1e4,
    "max_position_embeddings": 128,
    "torch_dtype": "float32",
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
_SCALING = {"rope_theta": 1e4, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 4}
ARCHITECTURES = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "olmo2": {},
    "nanochat": {},
    "gemma2": {
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 16,
    },
    "gemma3_text": {"query_pre_attn_scalar": 16, "sliding_window": 4, "sliding_window_pattern": 2},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": _EXPERTS,
    "mistral3": {
        "text_config": {**CONFIG, "model_type": "ministral3", "rope_parameters": _SCALING}
    },
    "cohere2": {"layer_norm_eps": 1e-5, "sliding_window": 4, "sliding_window_pattern": 3},
    "gpt_neox": {"layer_norm_eps": 1e-5, "rotary_emb_base": 1e4, "rotary_pct": 0.25},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "granite": {
        "logits_scaling": 2.0,
        "attention_multiplier": 0.1,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "lfm2": {
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 64,
        "block_ff_dim": 128,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "full_attn_idxs": [1],
    },
    "mamba": {
        "state_size": 4,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 4,
    },
}


def on_mlx(test: Callable[..., Any]) -> Callable[..., Any]:
    """Run a whole function on the MLX thread."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> Any:
        return mlx_call(test, *args, **kwargs)

    return run


def settings(name: str, **changes: Any) -> dict[str, Any]:
    """Return the config of an architecture in the list above."""
    return {**CONFIG, "model_type": name.split()[0], **ARCHITECTURES[name], **changes}


@on_mlx
def tiny(name: str = "llama", **changes: Any) -> tuple[nn.Module, ModelSpec]:
    """Return a model of random weights, always the same ones, and its spec."""
    mx.random.seed(11)
    module = skeleton(settings(name, **changes))
    mx.eval(module.parameters())
    return module, describe(module, "tiny")


@on_mlx
def quantized(module: nn.Module, spec: ModelSpec, config: QuantConfig | None) -> nn.Module:
    """Return the model with every layer stored under a config; None leaves it as it is."""
    if config is None:
        return module
    work = quantize(module, spec, QuantPlan(config), "rtn", {})
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


@on_mlx
def dense(
    module: nn.Module,
    spec: ModelSpec,
    config: QuantConfig | None,
    name: str = "llama",
    **changes: Any,
) -> nn.Module:
    """Return the numbers of ``quantized`` in plain layers; shares no module with the model that it is made from."""
    made = skeleton(settings(name, **changes))
    made.update(module.parameters())
    for layer in spec.layers if config else ():
        plain = module_at(made, layer.path)
        plain.weight = config.scheme.dequantize(
            config.scheme.quantize(plain.weight, config), config, mx.float32
        )
    mx.eval(made.parameters())
    return made
