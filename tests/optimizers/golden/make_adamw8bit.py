"""Makes adamw8bit.npz, golden vectors of one step of 8-bit AdamW, from bitsandbytes' own code.

    python -m venv golden && golden/bin/pip install torch==2.13.0 bitsandbytes==0.50.2 numpy
    golden/bin/python tests/optimizers/golden/make_adamw8bit.py

The update is that of bitsandbytes' CPU optimizer, around the *default* torch kernels that round the moments: they follow the
exact rule, where the CPU's kernel takes a short cut through a look-up table and gives other codes.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import bitsandbytes  # noqa: F401
import bitsandbytes._ops as registry
import numpy as np
import torch
from bitsandbytes.backends.cpu import ops as cpu
from bitsandbytes.functional import create_dynamic_map

kernels = {}


def capture(name: str, _key: str):
    def keep(function):
        kernels[name.split("::")[1]] = function
        return function

    return keep


def grow(codes, absmax, code, block):
    return kernels["dequantize_blockwise"](codes, absmax, code, block, torch.float32)


def shrink(values, code, absmax, codes, block):
    new_codes, new_absmax = kernels["quantize_blockwise"](values, code, block)
    codes.copy_(new_codes)
    absmax.copy_(new_absmax)


registry.register_kernel = capture
importlib.reload(importlib.import_module("bitsandbytes.backends.default.ops"))
cpu._dequant_blockwise_fp32_direct, cpu._quant_blockwise_fp32_direct = grow, shrink

signed, unsigned = create_dynamic_map(signed=True), create_dynamic_map(signed=False)
made = {"signed": signed.numpy(), "unsigned": unsigned.numpy()}
rng = np.random.default_rng(0)
for name, shape in {
    "whole": (64, 68),
    "rest": (17, 241),
}.items():  # 17 blocks of 256; 16 blocks and one number
    blocks = -(-shape[0] * shape[1] // 256)
    p = torch.from_numpy(rng.normal(0, 1, shape).astype(np.float16)).float()
    codes = [torch.zeros(shape, dtype=torch.uint8) for _ in range(2)]
    absmax = [torch.zeros(blocks) for _ in range(2)]
    scale = np.exp(
        rng.normal(0, 1, shape)
    )  # some coordinates have far larger gradients than others
    for step in range(1, 11):
        g = (rng.normal(0, 1, shape) * scale).astype(np.float16)
        if step in (1, 10):
            p = p.half().float()
            made |= {
                f"{name}_{step}_{key}": value.numpy().copy()
                for key, value in {
                    "p": p.half(),
                    "m": codes[0],
                    "v": codes[1],
                    "m_scale": absmax[0],
                    "v_scale": absmax[1],
                }.items()
            }
        cpu._optimizer_update_8bit_blockwise_cpu(
            "adam",
            torch.from_numpy(g).float(),
            p,
            codes[0],
            codes[1],
            0.9,
            0.999,
            0.0,
            0.0,
            1e-8,
            step,
            1e-2,
            signed,
            unsigned,
            absmax[0],
            absmax[1],
            0.1,
            1.0,
        )
        if step in (1, 10):
            after = {
                "p": p,
                "m": codes[0],
                "v": codes[1],
                "m_scale": absmax[0],
                "v_scale": absmax[1],
            }
            made[f"{name}_{step}_g"] = g
            made |= {
                f"{name}_{step}_new_{key}": value.numpy().copy() for key, value in after.items()
            }
np.savez_compressed(Path(__file__).with_name("adamw8bit.npz"), **made)
