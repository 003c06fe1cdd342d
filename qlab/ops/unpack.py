"""Packed codes → weights in one pass, by a kernel of qlab's own where MLX has a GPU.

Out of MLX's operations a look-up writes and reads a float32 array of the weight's size on its way,
and MLX's own kernel for affine codes on CUDA writes two weights a thread, a quarter of what the
memory could take. A kernel is used only if its numbers are those of MLX's operations, bit for bit.
On a CPU codes that do not divide a byte are looked up. Knows no scheme and no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import gcd
from typing import Any

import mlx.core as mx
import numpy as np

_INDEX = {
    "cuda": "size_t i = cooperative_groups::this_grid().thread_rank();",
    "metal": "size_t i = thread_position_in_grid.x;",
}
_DEVICE = {
    "cuda": "",
    "metal": "device ",
}  # where MSL wants to be told which memory a pointer is into
_BODY = """
    constexpr int EACH = 32 / BITS;
    constexpr int BYTES = EACH * sizeof(T);
    struct alignas(BYTES < 16 ? BYTES : 16) Run { T values[EACH]; };
    uint32_t word = codes[i];
    size_t group = i / WORDS;
    Run run;
    for (int k = 0; k < EACH; ++k) {
        uint32_t code = (word >> (BITS * k)) & ((1u << BITS) - 1);
        run.values[k] = VALUE;
    }
    reinterpret_cast<DEVICE Run*>(out)[i] = run;
"""

Kernel = Callable[..., list[mx.array]]
Plain = Callable[[mx.array, Sequence[mx.array], int, int, mx.Dtype], mx.array]


@dataclass(frozen=True, eq=False)
class Unpack:
    """A way from codes to weights.

    Args:
        name: of the kernel.
        names: of the arrays of a number a group that it reads.
        value: of a weight in C++, from ``code`` and those arrays at ``group``.
        plain: does the same by MLX's operations, from codes, arrays, bits, group size and dtype.
        follows: whether those arrays have the dtype of the weights; else they are float32.
        constants: further arrays that ``value`` reads, by name.
        backends: on which the kernel is worth having.
    """

    name: str
    names: tuple[str, ...]
    value: str
    plain: Plain
    follows: bool
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    backends: tuple[str, ...] = ("cuda", "metal")

    def __call__(
        self,
        codes: mx.array,
        arrays: Sequence[mx.array],
        bits: int,
        group_size: int,
        dtype: mx.Dtype,
    ) -> mx.array:
        """Return the weights.

        Args:
            codes: uint32 ``(…, in · bits / 32)``, the first code in the lowest bits.
            arrays: as ``names`` has them, ``(…, in / group_size)``.
            bits: of a code.
            group_size: weights that share a number, a multiple of 32.
            dtype: of what is returned, ``(…, in)``.
        """
        kernel = (
            kernel_of(self, bits, dtype, mx.default_device() == mx.gpu)
            if codes.size and 32 % bits == 0
            else None
        )
        if kernel is None:
            return self.plain(codes, arrays, bits, group_size, dtype)
        return self.fused(kernel, codes, arrays, bits, group_size, dtype)

    def fused(
        self,
        kernel: Kernel,
        codes: mx.array,
        arrays: Sequence[mx.array],
        bits: int,
        group_size: int,
        dtype: mx.Dtype,
    ) -> mx.array:
        """Do the same by a kernel."""
        return kernel(
            inputs=[codes, *arrays, *(mx.array(x) for x in self.constants.values())],
            template=[("T", dtype), ("BITS", bits), ("WORDS", group_size * bits // 32)],
            grid=(codes.size, 1, 1),
            threadgroup=(
                gcd(codes.size, 256),
                1,
                1,
            ),  # whole groups of threads only: none looks beyond the end
            output_shapes=[(*codes.shape[:-1], codes.shape[-1] * 32 // bits)],
            output_dtypes=[dtype],
        )[0]

    def agrees(self, kernel: Kernel, bits: int, dtype: mx.Dtype) -> bool:
        """Whether a kernel gives the very numbers that MLX's operations give, tried on some rows."""
        rng = np.random.default_rng(0)
        codes = mx.array(rng.integers(0, 2**32, (64, 4 * bits), np.uint32))
        own = dtype if self.follows else mx.float32
        arrays = [
            mx.array(rng.standard_normal((64, 4)).astype(np.float32)).astype(own)
            for _ in self.names
        ]
        given = codes, arrays, bits, 32, dtype
        try:
            return bool(mx.array_equal(self.fused(kernel, *given), self.plain(*given)))
        except (RuntimeError, ValueError):  # it does not compile here
            return False


@cache
def kernel_of(unpack: Unpack, bits: int, dtype: mx.Dtype, gpu: bool) -> Kernel | None:
    """Return the kernel of MLX's default device, a GPU or not, if there is one and its numbers are
    right.
    """
    if not gpu:
        return None
    name = "metal" if mx.metal.is_available() else "cuda"
    if name not in unpack.backends:
        return None
    make: Any = mx.fast.metal_kernel if name == "metal" else mx.fast.cuda_kernel
    body = _BODY.replace("VALUE", unpack.value).replace("DEVICE ", _DEVICE[name])
    kernel = make(
        name=unpack.name,
        input_names=["codes", *unpack.names, *unpack.constants],
        output_names=["out"],
        source=_INDEX[name] + body,
    )
    return kernel if unpack.agrees(kernel, bits, dtype) else None


def lookup(table: np.ndarray) -> Unpack:
    """Return the way by a table: ``table[code] · scale``, computed in float32.

    Args:
        table: float32 ``(16,)``, for codes of four bits.
    """
    table = np.ascontiguousarray(table, np.float32)
    byte = np.arange(256)
    # both values of every byte of two codes, as one uint64, so that one look-up reads two
    pairs = np.stack([table[byte & 15], table[byte >> 4]], 1).view(np.uint64)[:, 0]

    def plain(
        codes: mx.array, arrays: Sequence[mx.array], bits: int, group_size: int, dtype: mx.Dtype
    ) -> mx.array:
        values = mx.take(mx.array(pairs), codes.view(mx.uint8)).view(mx.float32)
        groups = values.reshape(*codes.shape[:-1], -1, group_size) * arrays[0][..., None]
        return groups.reshape(*codes.shape[:-1], -1).astype(dtype)

    value = "static_cast<T>(table[code] * scales[group])"
    return Unpack(
        "qlab_lookup", ("scales",), value, plain, follows=False, constants={"table": table}
    )


def _affine(
    codes: mx.array, arrays: Sequence[mx.array], bits: int, group_size: int, dtype: mx.Dtype
) -> mx.array:
    scales, biases = arrays
    if bits not in _AT_ONCE or mx.default_device() != mx.cpu:
        return mx.dequantize(codes, scales, biases, group_size, bits, dtype=dtype)
    values = _looked_up(codes, bits).astype(dtype).reshape(*codes.shape[:-1], -1, group_size)
    return (values * scales[..., None] + biases[..., None]).reshape(*codes.shape[:-1], -1)


_AT_ONCE = {3: 4, 5: 2, 6: 2}  # codes looked up at once, of bits that do not divide a byte


def _looked_up(codes: mx.array, bits: int) -> mx.array:
    """Return such codes as float32 numbers. MLX's CPU goes bit by bit.

    Five times as slow, in three times the memory.
    """
    width = bits * _AT_ONCE[bits]
    count = 5 if bits == 5 else 3  # bytes after which codes begin with a byte again
    parts = codes.view(mx.uint8).reshape(*codes.shape[:-1], -1, count).astype(mx.uint16)
    found = []
    for at in range(0, 8 * count, width):
        low = parts[..., at // 8] >> at % 8
        high = parts[..., at // 8 + 1] & (2 ** (width + at % 8 - 8) - 1)
        found.append(low | high << (8 - at % 8))
    return (
        mx.take(mx.array(_numbers(bits)), mx.stack(found, -1), axis=0)
        .view(mx.float32)
        .reshape(*codes.shape[:-1], -1)
    )


@cache
def _numbers(bits: int) -> np.ndarray:
    """Every run of codes that is looked up at once, as numbers: one uint64 holds two of them."""
    count = _AT_ONCE[bits]
    runs = np.arange(2 ** (bits * count))[:, None] >> bits * np.arange(count) & (2**bits - 1)
    return np.squeeze(runs.astype(np.float32).view(np.uint64))


affine = Unpack(
    "qlab_affine",
    ("scales", "biases"),
    "static_cast<T>(code) * scales[group] + biases[group]",
    _affine,
    follows=True,
    backends=("cuda",),  # Metal's own is as good as its memory
)
