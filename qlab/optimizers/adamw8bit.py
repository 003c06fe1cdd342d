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


State = dict[str, mx.array]


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

    def init_single(self, parameter: mx.array, state: State) -> None:
        whole = parameter.size < _LEAST
        dtype = mx.float32 if whole else mx.uint8
        blocks = ceil_div(parameter.size, _BLOCK)
        for name in ("m", "v"):
            state[name] = mx.zeros(parameter.shape, dtype)
            if not whole:
                state[_scale_of(name)] = mx.zeros(blocks, mx.float32)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: State) -> mx.array:
        gradient = gradient.astype(mx.float32)
        rate = self.learning_rate.astype(mx.float32)
        b1, b2 = self.betas
        old_m = b1 * self._read(state, "m")
        m = old_m + (1 - b1) * gradient
        old_v = b2 * self._read(state, "v")
        v = old_v + (1 - b2) * mx.square(gradient)
        # 1 − β^t by expm1: the plain difference would lose digits
        t = self.step.astype(mx.float32)
        m_share = -mx.expm1(t * math.log(b1))
        v_share = -mx.expm1(t * math.log(b2))
        size = mx.sqrt(v) / mx.sqrt(v_share)
        move = m / (size + self.eps)
        full = parameter.astype(mx.float32)
        decayed = full * (1 - rate * self.weight_decay)
        updated = decayed - rate / m_share * move
        self._write(state, "m", m)
        self._write(state, "v", v)
        return updated.astype(parameter.dtype)

    def _read(self, state: State, name: str) -> mx.array:
        moment = state[name]
        if moment.dtype == mx.float32:
            return moment
        scale = state[_scale_of(name)]
        return self._codes[name].values(moment, scale)

    def _write(self, state: State, name: str, values: mx.array) -> None:
        if state[name].dtype == mx.float32:
            state[name] = values
            return
        codes, scale = self._codes[name].codes(values)
        state[name] = codes
        state[_scale_of(name)] = scale


def _scale_of(moment: str) -> str:
    """Return the name of a moment's scales in a state."""
    return f"{moment}_scale"


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
        scaled = mx.take(self._map, _blocks(codes))
        blocks = scaled * scale[:, None]
        return _shaped_like(codes, blocks)

    def codes(self, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return uint8 codes in the shape of the numbers, and float32 scales ``(blocks,)``."""
        blocks = _blocks(values)  # (blocks, 256)
        scale = mx.abs(blocks).max(1)
        divisor = mx.maximum(scale, _SMALLEST)
        factor = 1 / divisor
        scaled = blocks * factor[:, None]  # −1 to 1
        bucket = scaled.view(mx.uint32) >> 16
        above = scaled > mx.take(self._edge, bucket)
        codes = mx.take(self._base, bucket) + above.astype(mx.uint8)
        if not self._signed:
            is_above_zero = blocks > 0
            codes = mx.maximum(codes, is_above_zero.astype(mx.uint8))
        return _shaped_like(values, codes), scale


def _blocks(values: mx.array) -> mx.array:
    """Return numbers, padded with zeros, as ``(blocks, 256)``."""
    flat = values.reshape(-1)
    missing = -flat.size % _BLOCK
    padded = mx.pad(flat, (0, missing))
    return padded.reshape(-1, _BLOCK)


def _shaped_like(values: mx.array, blocks: mx.array) -> mx.array:
    """Return blocks without their padding, in the shape of ``values``."""
    flat = blocks.reshape(-1)
    unpadded = flat[: values.size]
    return unpadded.reshape(values.shape)


SHELF = (
    AdamW8bit("adamw8bit", "AdamW, both moments in 8 bits"),
    # the name in other libraries' recipes: there moments may move to the host's memory; MLX's
    # memory is the host's
    AdamW8bit(
        "paged_adamw8bit", "the same as adamw8bit: memory is unified, so there is nothing to page"
    ),
)
