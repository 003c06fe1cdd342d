"""Makes nf4.npz, the golden vectors of NF4 and double quantization, from bitsandbytes' own code.

    python -m venv golden && golden/bin/pip install torch==2.13.0 bitsandbytes==0.50.2 numpy
    golden/bin/python tests/schemes/golden/make_golden.py

The *default* torch kernels are taken, which follow the exact rule of the CUDA kernels; bitsandbytes' CPU kernel for
8-bit blocks takes a short cut through a look-up table and gives other codes.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import bitsandbytes  # noqa: F401
import bitsandbytes._ops as registry
import numpy as np
import torch
from bitsandbytes.functional import create_dynamic_map, get_4bit_type

kernels = {}


def capture(name: str, _key: str):
    def keep(function):
        kernels[name.split("::")[1]] = function
        return function

    return keep


registry.register_kernel = capture
importlib.reload(importlib.import_module("bitsandbytes.backends.default.ops"))

rng = np.random.default_rng(0)
rows = [
    rng.normal(0, 0.02, (4, 320)),
    rng.standard_t(5, (4, 320)) * 0.01,
    rng.uniform(-3, 3, (3, 320)),
    rng.normal(0, 1e-6, (1, 320)),
]
weight = np.concatenate(rows).astype(np.float32)
weight[3, 64:128] = 0
weight[5, :64] = 0.125
table = np.sort(get_4bit_type("nf4", device="cpu").numpy())
middle = (table[1:] + table[:-1]) / np.float32(2)
weight[6, :64] = np.resize(np.append(middle, np.float32(1)), 64)  # ties
close = (
    np.float32(0.7)
    * middle
    * (1 + np.arange(-4, 5, dtype=np.float32)[:, None] * np.float32(2**-24))
)
differ = close[(close * (1 / np.float32(0.7)) > middle) != (close / np.float32(0.7) > middle)]
assert differ.size  # where a product with the reciprocal and a quotient choose different codes
weight[6, 64:128] = np.append(np.resize(differ, 63), np.float32(0.7))
made = {"weight": weight}
for dtype in ("float32", "bfloat16", "float16"):
    w = torch.from_numpy(weight).to(getattr(torch, dtype))
    packed, absmax = kernels["quantize_4bit"](w, 64, "nf4", torch.uint8)
    values = kernels["dequantize_4bit"](packed, absmax, 64, "nf4", w.shape, w.dtype)
    made[f"{dtype}_packed"] = packed.numpy().reshape(-1)
    made[f"{dtype}_absmax"] = absmax.numpy()
    made[f"{dtype}_values"] = (
        values.float().numpy().astype(np.float32)
        if dtype == "float32"
        else values.view(torch.int16).numpy()
    )
scales = torch.from_numpy(
    np.abs(rng.normal(0.05, 0.02, 600)).astype(np.float32)
)  # two blocks of 256 and a rest
code = create_dynamic_map(signed=True)
offset = scales.mean()
codes, second = kernels["quantize_blockwise"](scales - offset, code, 256)
back = kernels["dequantize_blockwise"](codes, second, code, 256, torch.float32) + offset
made |= {
    "dq_scales": scales.numpy(),
    "dq_map": code.numpy(),
    "dq_offset": offset.numpy(),
    "dq_codes": codes.numpy(),
    "dq_second": second.numpy(),
    "dq_back": back.numpy(),
}
np.savez_compressed(Path(__file__).with_name("nf4.npz"), **made)
