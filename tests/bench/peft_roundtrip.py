"""PEFT itself opens what qlab writes, with equal logits, and qlab opens what PEFT writes.

    .venv/bin/python -m tests.bench.peft_roundtrip --torch OTHER/bin/python

where OTHER is an environment with torch, transformers and peft (CPU versions will do); it needs no qlab, and qlab needs none
of them. ``tests/engine/adapt/test_files.py`` checks the same against PEFT's documented forward, without torch.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
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
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 1,
}
TOKENS = [[5, 10, 7, 90, 33, 2, 61, 17]]
LIMIT = 1e-4  # of the logits, float32
CASES = {
    "lora": {"rank": 4},
    "rslora": {"rank": 4, "rslora": True, "keys": ("q_proj", "v_proj")},
    "dora": {"rank": 4, "kind": "dora"},
    "last block": {"rank": 4, "num_layers": 1},
    "patchwork": {"rank": 4, "keys": ("*.1.mlp.*", "model.layers.0.self_attn.o_proj")},
    "head": {"rank": 4, "keys": ("down_proj", "lm_head"), "num_layers": 2},
    "embedding": {"rank": 4, "keys": ("embed_tokens", "q_proj")},
    "bfloat16": {"rank": 4, "dtype": "bfloat16"},
}
# what PEFT trains by itself, for the way back
THEIRS = {
    "plain": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "all": {"r": 4, "lora_alpha": 4, "target_modules": "all-linear", "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 8, "target_modules": ["up_proj", "down_proj"], "use_dora": True},
    "pattern": {"r": 4, "lora_alpha": 8, "target_modules": r".*\.[12]\.mlp\.(gate|up)_proj"},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "o_proj"],
        "rank_pattern": {"o_proj": 2},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 32},
    },
    "one layer": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
    },
}
# settings with which both sides make a small model; the names of its layers are compared
_ROPE = {
    "rope_parameters": {
        "rope_theta": 1e4,
        "llama_4_scaling_beta": 0.1,
        "original_max_position_embeddings": 4,
    },
    "layer_types": ["full_attention"] * 3,
}
_NORM = {"layer_norm_eps": 1e-5, "norm_epsilon": 1e-5, "norm_eps": 1e-5}
MORE = {
    "cohere": _NORM,
    "starcoder2": _NORM,
    "ministral3": _ROPE,
    "ernie4_5": {"use_bias": False},
    "stablelm": {
        **_NORM,
        "qk_layernorm": False,
        "use_qkv_bias": True,
        "partial_rotary_factor": 0.25,
    },
}


def write(folder: Path) -> None:
    """Write a base, adapters and the logits that they should give; with qlab."""
    import mlx.core as mx
    import numpy as np
    from mlx.utils import tree_flatten

    from qlab.core.config.lora import LoRAConfig
    from qlab.engine.adapt.attach import twin_with
    from qlab.engine.adapt.files import save_adapter
    from qlab.engine.adapt.peft import SAME_NAMES
    from tests.engine.adapt.test_files import stirred
    from tests.tiny import ARCHITECTURES, settings, tiny

    module, spec = tiny()
    (folder / "base").mkdir(parents=True)
    (folder / "base" / "config.json").write_text(json.dumps(CONFIG))
    mx.save_safetensors(
        str(folder / "base" / "model.safetensors"),
        dict(tree_flatten(module.parameters())),
        {"format": "pt"},
    )
    for name, made in CASES.items():
        lora = LoRAConfig(**made)
        parameters = stirred(module, spec, lora)
        save_adapter(
            folder / name,
            parameters,
            lora,
            spec,
            str(folder / "base"),
            format="peft",
            model_type="llama",
        )
        np.save(
            folder / f"{name}.npy",
            np.array(twin_with(module, spec, lora, parameters)(mx.array(TOKENS))),
        )
    names = {}
    for kind in SAME_NAMES:
        ARCHITECTURES.setdefault(kind, MORE.get(kind, {}))
        names[kind] = (
            settings(kind),
            [layer.path for layer in tiny(kind)[1].layers if layer.kind == "linear"],
        )
    (folder / "names.json").write_text(json.dumps(names))


def check(folder: Path) -> None:
    """Open them with PEFT, compare; make adapters with PEFT for the way back. With torch, without qlab."""
    import numpy as np
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

    def base():
        return AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)

    def logits(model) -> np.ndarray:
        with torch.no_grad():
            return model.eval()(torch.tensor(TOKENS)).logits.float().numpy()

    plain = logits(base())
    for name in CASES:
        got, wanted = (
            logits(PeftModel.from_pretrained(base(), folder / name)),
            np.load(folder / f"{name}.npy"),
        )
        _line(f"qlab → PEFT, {name}", np.abs(got - wanted).max(), np.abs(plain - wanted).max())
    for name, settings in THEIRS.items():
        torch.manual_seed(3)
        model = get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", **settings))
        for key, parameter in model.named_parameters():
            if "lora_B" in key or "magnitude" in key:
                parameter.data += 0.2 * torch.randn_like(parameter)
        np.save(folder / f"theirs {name}.npy", logits(model))
        model.save_pretrained(folder / f"theirs {name}")
    for kind, (settings, paths) in json.loads((folder / "names.json").read_text()).items():
        del settings["torch_dtype"]
        with torch.device("meta"):
            made = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(pad_token_id=0, **settings)
            )
        named = {
            path for path, module in made.named_modules() if isinstance(module, torch.nn.Linear)
        } - {"lm_head"}
        if named != set(paths) - {"lm_head"}:
            raise SystemExit(f"{kind}: names differ: {sorted(named ^ set(paths))[:4]}")
    print(
        f"{len(json.loads((folder / 'names.json').read_text()))} architectures have the same names of layers"
    )


def read(folder: Path) -> None:
    """Open PEFT's adapters with qlab and compare; and an adapter of qlab that went through PEFT."""
    import mlx.core as mx
    import numpy as np

    from qlab.engine.adapt.attach import twin_with
    from qlab.engine.adapt.files import load_adapter
    from tests.tiny import tiny

    module, spec = tiny()
    plain = np.array(module(mx.array(TOKENS)))
    for name in THEIRS:
        lora, parameters, _ = load_adapter(folder / f"theirs {name}", spec)
        got = np.array(twin_with(module, spec, lora, parameters)(mx.array(TOKENS)))
        wanted = np.load(folder / f"theirs {name}.npy")
        _line(f"PEFT → qlab, {name}", np.abs(got - wanted).max(), np.abs(plain - wanted).max())


def _line(what: str, error: float, effect: float) -> None:
    print(
        f"{what:<28} largest difference of logits {error:.1e}, effect of the adapter {effect:.2f}",
        flush=True,
    )
    if not error < LIMIT < effect:
        raise SystemExit(f"{what}: {error:.1e} is above {LIMIT:.0e}, or the adapter has no effect")


def main() -> None:
    """Run the three parts, the middle one with the other interpreter."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--torch", help="python of an environment with torch, transformers and peft"
    )
    parser.add_argument("--check", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.check:
        return check(args.check)
    from qlab.runtime.job import mlx_call

    with tempfile.TemporaryDirectory() as folder:
        mlx_call(write, Path(folder))
        done = subprocess.run(
            [
                args.torch or sys.executable,
                "-W",
                "error::UserWarning:peft",
                __file__,
                "--check",
                folder,
            ]
        )
        if done.returncode:
            raise SystemExit(done.returncode)
        mlx_call(read, Path(folder))


if __name__ == "__main__":
    main()
