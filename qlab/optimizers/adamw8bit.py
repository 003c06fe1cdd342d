"""AdamW with both moments in 8 bits.

Blocks of 256 numbers, scaled, each the nearest value of a dynamic map.

Source: Dettmers et al. 2022 (arXiv:2110.02861), and bitsandbytes' exact rule
(``backends/default/ops.py``; its CPU kernel takes a coarse table instead, so its codes differ). As
there, the update uses the moments before they are rounded, decay comes before the update, as in
bitsandbytes' CPU path (its CUDA kernel decays after, a difference of the order of the squared
learning rate), and small tensors keep float32. One thing is not as there: a second moment above
zero never becomes zero. Rounded to zero beside a first moment that is not, it would divide by
nothing (arXiv:2309.01507, section 4.1).
"""

from __future__ import annotations

import math
from math import prod
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from qlab.core.arithmetic import ceil_div
from qlab.core.config.train import MlxLmOptimizer, OptimizerKind
from qlab.ops.dynamic_map import dynamic_map, search_table

_BLOCK = 256
_LEAST = 4096  # numbers in a tensor from which on its moments are rounded
_SMALLEST = 1e-38


class AdamW8bit(OptimizerKind):
    """AdamW in a quarter of the memory of float32 moments.

    Args:
        name: name on the shelf.
        title: one line that says what it is.
    """

    def __init__(self, name: str, title: str) -> None:
        self.name = name
        self.title = title
        self.mlx_lm = MlxLmOptimizer(
            "adamw",
            {"bias_correction": True},
            f"It has no {name!r}: AdamW with float32 moments, four times the state.",
        )

    def state_nbytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        size = prod(shape)
        if size < _LEAST:
            return 2 * 4 * size  # two float32 moments
        scales = ceil_div(size, _BLOCK)  # float32
        return 2 * (size + 4 * scales)

    def make(self, learning_rate: float, weight_decay: float = 0.0) -> Any:
        return _Optimizer(learning_rate, weight_decay)


class _Optimizer(optim.Optimizer):
    def __init__(self, learning_rate: float, weight_decay: float) -> None:
        super().__init__()
        self._maybe_schedule("learning_rate", learning_rate)
        self.betas = (0.9, 0.999)
        self.eps = 1e-8
        self.weight_decay = weight_decay
        self._codes = {"m": _Codes(signed=True), "v": _Codes(signed=False)}

    def init_single(self, parameter: mx.array, state: dict[str, mx.array]) -> None:
        whole = parameter.size < _LEAST
        for name in ("m", "v"):
            state[name] = mx.zeros(parameter.shape, mx.float32 if whole else mx.uint8)
            if not whole:
                state[f"{name}_scale"] = mx.zeros(ceil_div(parameter.size, _BLOCK), mx.float32)

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]
    ) -> mx.array:
        gradient = gradient.astype(mx.float32)
        rate = self.learning_rate.astype(mx.float32)
        b1, b2 = self.betas
        m = b1 * self._read(state, "m") + (1 - b1) * gradient
        v = b2 * self._read(state, "v") + (1 - b2) * mx.square(gradient)
        # 1 − β^t by expm1: the plain difference would lose digits
        t = self.step.astype(mx.float32)
        m_share = -mx.expm1(t * math.log(b1))
        v_share = -mx.expm1(t * math.log(b2))
        move = m / (mx.sqrt(v) / mx.sqrt(v_share) + self.eps)
        decayed = parameter.astype(mx.float32) * (1 - rate * self.weight_decay)
        updated = decayed - rate / m_share * move
        self._write(state, "m", m)
        self._write(state, "v", v)
        return updated.astype(parameter.dtype)

    def _read(self, state: dict[str, mx.array], name: str) -> mx.array:
        moment = state[name]
        if moment.dtype == mx.float32:
            return moment
        return self._codes[name].values(moment, state[f"{name}_scale"])

    def _write(self, state: dict[str, mx.array], name: str, values: mx.array) -> None:
        if state[name].dtype == mx.float32:
            state[name] = values
        else:
            state[name], state[f"{name}_scale"] = self._codes[name].codes(values)


class _Codes:
    """Numbers as codes of a dynamic map, in blocks of 256 that share a scale.

    An unsigned number above zero stays above zero. The tables are made once: a compiled step keeps
    each array that it is given as a constant.

    Args:
        signed: whether numbers may be negative.
    """

    def __init__(self, signed: bool) -> None:
        self._signed = signed
        base, edge = search_table(signed)
        self._map = mx.array(dynamic_map(signed))
        # by the upper 16 bits of a float32: the code, and the number from which on it is one more
        self._base = mx.array(base)
        self._edge = mx.array(edge)

    def values(self, codes: mx.array, scale: mx.array) -> mx.array:
        """Return float32 numbers in the shape of their codes."""
        blocks = mx.take(self._map, _blocks(codes)) * scale[:, None]
        return blocks.reshape(-1)[: codes.size].reshape(codes.shape)

    def codes(self, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return uint8 codes in the shape of the numbers, and float32 scales ``(blocks,)``."""
        blocks = _blocks(values)  # (blocks, 256)
        scale = mx.abs(blocks).max(1)
        scaled = blocks * (1 / mx.maximum(scale, _SMALLEST))[:, None]  # −1 to 1
        bucket = scaled.view(mx.uint32) >> 16
        above = scaled > mx.take(self._edge, bucket)
        codes = mx.take(self._base, bucket) + above.astype(mx.uint8)
        if not self._signed:
            codes = mx.maximum(codes, (blocks > 0).astype(mx.uint8))
        return codes.reshape(-1)[: values.size].reshape(values.shape), scale


def _blocks(values: mx.array) -> mx.array:
    """Return numbers, padded with zeros, as ``(blocks, 256)``."""
    flat = values.reshape(-1)
    return mx.pad(flat, (0, -flat.size % _BLOCK)).reshape(-1, _BLOCK)


SHELF = (
    AdamW8bit("adamw8bit", "AdamW, both moments in 8 bits"),
    # the name in other libraries' recipes: there moments may move to the host's memory; MLX's
    # memory is the host's
    AdamW8bit(
        "paged_adamw8bit", "the same as adamw8bit: memory is unified, so there is nothing to page"
    ),
)
