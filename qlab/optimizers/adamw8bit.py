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
from qlab.core.config.train import OptimizerKind
from qlab.ops.dynamic_map import dynamic_map, search_table

_BLOCK = 256
_LEAST = 4096  # numbers in a tensor from which on its moments are rounded
_SMALLEST = 1e-38


class AdamW8bit(OptimizerKind):
    """AdamW in a quarter of the memory of float32 moments.

    Args:
        name: on the shelf.
        title: one line that says what it is.
    """

    def __init__(self, name: str, title: str) -> None:
        self.name = name
        self.title = title

    def state_nbytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        size = prod(shape)
        return 8 * size if size < _LEAST else 2 * (size + 4 * ceil_div(size, _BLOCK))

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
        slope = gradient.astype(mx.float32)
        rate = self.learning_rate.astype(mx.float32)
        m, v = (self._read(state, name) for name in ("m", "v"))
        m = self.betas[0] * m + (1 - self.betas[0]) * slope
        v = self.betas[1] * v + (1 - self.betas[1]) * mx.square(slope)
        # 1 − β^t without the digits that the difference would lose
        t = self.step.astype(mx.float32)
        corrected, root = (-mx.expm1(t * math.log(beta)) for beta in self.betas)
        move = m / (mx.sqrt(v) / mx.sqrt(root) + self.eps)
        new = (
            parameter.astype(mx.float32) * (1 - rate * self.weight_decay) - rate / corrected * move
        )
        self._write(state, "m", m)
        self._write(state, "v", v)
        return new.astype(parameter.dtype)

    def _read(self, state: dict[str, mx.array], name: str) -> mx.array:
        whole = state[name].dtype == mx.float32
        return (
            state[name] if whole else self._codes[name].values(state[name], state[f"{name}_scale"])
        )

    def _write(self, state: dict[str, mx.array], name: str, values: mx.array) -> None:
        if state[name].dtype == mx.float32:
            state[name] = values
        else:
            state[name], state[f"{name}_scale"] = self._codes[name].codes(values)


class _Codes:
    """Numbers as codes of a dynamic map, in blocks that share a scale.

    An unsigned number above zero stays above zero.

    Holds the tables once: a compiled step keeps each array that it is given as a constant.
    """

    def __init__(self, signed: bool) -> None:
        self._signed = signed
        self._map, self._base, self._edge = (
            mx.array(t) for t in (dynamic_map(signed), *search_table(signed))
        )

    def values(self, codes: mx.array, scale: mx.array) -> mx.array:
        """Return float32 numbers in the shape of their codes."""
        blocks = mx.take(self._map, _blocks(codes)) * scale[:, None]
        return blocks.reshape(-1)[: codes.size].reshape(codes.shape)

    def codes(self, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return uint8 codes in the shape of the numbers, and float32 scales ``(blocks,)``."""
        blocks = _blocks(values)
        scale = mx.abs(blocks).max(1)
        scaled = blocks * (1 / mx.maximum(scale, _SMALLEST))[:, None]
        bucket = scaled.view(mx.uint32) >> 16
        codes = mx.take(self._base, bucket) + (scaled > mx.take(self._edge, bucket)).astype(
            mx.uint8
        )
        if not self._signed:
            codes = mx.maximum(codes, (blocks > 0).astype(mx.uint8))
        return codes.reshape(-1)[: values.size].reshape(values.shape), scale


def _blocks(values: mx.array) -> mx.array:
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
