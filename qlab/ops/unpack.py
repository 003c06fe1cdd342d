"""Packed codes → weights in one pass, by a kernel of qlab's where MLX has a GPU.

Made of MLX's operations, a look-up writes and reads a float32 array of the weight's size on its
way; and MLX's own kernel for affine codes on CUDA writes two weights a thread, at a quarter of the
speed that the memory allows. A kernel is used only if its numbers are those of MLX's operations,
bit for bit. On a CPU codes that do not divide a byte are looked up. Used by ``nn/linear.py`` and
the schemes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import gcd
from typing import Any

import mlx.core as mx
import numpy as np

# Each thread reads one word of codes and writes its weights as one aligned store. In the source,
# T is the dtype of the weights, BITS of a code, WORDS the words of a group; VALUE and DEVICE are
# replaced before it is compiled.
_INDEX = {
    "cuda": "size_t i = cooperative_groups::this_grid().thread_rank();",
    "metal": "size_t i = thread_position_in_grid.x;",
}
# MSL wants to be told which memory a pointer is into
_DEVICE = {"cuda": "", "metal": "device "}
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
# from codes, arrays, bits, group size and dtype to weights
Plain = Callable[[mx.array, Sequence[mx.array], int, int, mx.Dtype], mx.array]


@dataclass(frozen=True, eq=False, kw_only=True)
class Unpack:
    """How packed codes become weights: by a kernel, or by MLX's operations.

    Example:
        >>> codes, *arrays = mx.quantize(weight, group_size=64, bits=4)
        >>> affine(codes, arrays, 4, 64, mx.float32).shape == weight.shape
        True

    Args:
        name: of the kernel.
        names: of the arrays that it reads, each with one number a group.
        value: of a weight in C++, from ``code`` and those arrays at ``group``.
        plain: does the same by MLX's operations, from codes, arrays, bits, group size and dtype.
        in_weight_dtype: whether those arrays have the dtype of the weights; else they are float32.
        constants: further arrays that ``value`` reads, by name.
        backends: on which the kernel is worth having.
    """

    name: str
    names: tuple[str, ...]
    value: str
    plain: Plain
    in_weight_dtype: bool
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
        """Return the weights, ``(…, in)``.

        Args:
            codes: uint32 ``(…, in · bits / 32)``, the first code in the lowest bits.
            arrays: as ``names`` has them, ``(…, in / group_size)``.
            bits: of a code.
            group_size: weights that share a number, a multiple of 32.
            dtype: of the weights.
        """
        kernel = None
        if codes.size and 32 % bits == 0:
            kernel = kernel_of(self, bits, dtype, mx.default_device() == mx.gpu)
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
        """Return the weights computed by a kernel; see ``__call__``."""
        constants = [mx.array(values) for values in self.constants.values()]
        (weights,) = kernel(
            inputs=[codes, *arrays, *constants],
            template=[("T", dtype), ("BITS", bits), ("WORDS", group_size * bits // 32)],
            grid=(codes.size, 1, 1),
            # whole groups of threads only: none looks beyond the end
            threadgroup=(gcd(codes.size, 256), 1, 1),
            output_shapes=[(*codes.shape[:-1], codes.shape[-1] * 32 // bits)],
            output_dtypes=[dtype],
        )
        return weights

    def agrees(self, kernel: Kernel, bits: int, dtype: mx.Dtype) -> bool:
        """Whether a kernel gives the very numbers of MLX's operations, tried on 64 rows of 128."""
        rng = np.random.default_rng(0)
        codes = mx.array(rng.integers(0, 2**32, (64, 4 * bits), np.uint32))
        arrays_dtype = dtype if self.in_weight_dtype else mx.float32
        arrays = [
            mx.array(rng.standard_normal((64, 4)).astype(np.float32)).astype(arrays_dtype)
            for _ in self.names
        ]
        try:
            by_kernel = self.fused(kernel, codes, arrays, bits, 32, dtype)
            plain = self.plain(codes, arrays, bits, 32, dtype)
            return bool(mx.array_equal(by_kernel, plain))
        except (RuntimeError, ValueError):  # it does not compile here
            return False


@cache
def kernel_of(unpack: Unpack, bits: int, dtype: mx.Dtype, gpu: bool) -> Kernel | None:
    """Return the kernel for MLX's default device, or None if it has none with right numbers.

    Args:
        unpack: what the kernel does.
        bits: of a code.
        dtype: of the weights.
        gpu: whether the default device is a GPU; an argument, so that the cache tells them apart.
    """
    if not gpu:
        return None
    name = "metal" if mx.metal.is_available() else "cuda"
    if name not in unpack.backends:
        return None
    compile_kernel: Any = mx.fast.metal_kernel if name == "metal" else mx.fast.cuda_kernel
    body = _BODY.replace("VALUE", unpack.value).replace("DEVICE ", _DEVICE[name])
    kernel = compile_kernel(
        name=unpack.name,
        input_names=["codes", *unpack.names, *unpack.constants],
        output_names=["out"],
        source=_INDEX[name] + body,
    )
    return kernel if unpack.agrees(kernel, bits, dtype) else None


def lookup(table: np.ndarray) -> Unpack:
    """Return how codes become weights by a table: ``table[code] · scale``, computed in float32.

    Args:
        table: float32 ``(16,)``, for codes of four bits.
    """
    table = np.ascontiguousarray(table, np.float32)
    byte = np.arange(256)
    # both values of every byte of two codes, as one uint64, so that one look-up reads two
    pairs = np.stack([table[byte & 15], table[byte >> 4]], 1).view(np.uint64)[:, 0]  # (256,)

    def plain(
        codes: mx.array, arrays: Sequence[mx.array], bits: int, group_size: int, dtype: mx.Dtype
    ) -> mx.array:
        outer = codes.shape[:-1]
        values = mx.take(mx.array(pairs), codes.view(mx.uint8)).view(mx.float32)  # (…, in)
        groups = values.reshape(*outer, -1, group_size) * arrays[0][..., None]
        return groups.reshape(*outer, -1).astype(dtype)

    return Unpack(
        name="qlab_lookup",
        names=("scales",),
        value="static_cast<T>(table[code] * scales[group])",
        plain=plain,
        in_weight_dtype=False,
        constants={"table": table},
    )


# codes that are looked up at once, by bits that do not divide a byte
_AT_ONCE = {3: 4, 5: 2, 6: 2}
# bytes after which a code begins with a byte again
_BYTES = {3: 3, 5: 5, 6: 3}


def _plain_affine(
    codes: mx.array, arrays: Sequence[mx.array], bits: int, group_size: int, dtype: mx.Dtype
) -> mx.array:
    """Return scale · code + bias by MLX's operations, ``(…, in)``."""
    scales, biases = arrays
    if bits not in _AT_ONCE or mx.default_device() != mx.cpu:
        return mx.dequantize(codes, scales, biases, group_size, bits, dtype=dtype)
    outer = codes.shape[:-1]
    values = _looked_up(codes, bits).astype(dtype).reshape(*outer, -1, group_size)
    return (values * scales[..., None] + biases[..., None]).reshape(*outer, -1)


def _looked_up(codes: mx.array, bits: int) -> mx.array:
    """Return codes that do not divide a byte as float32 numbers, ``(…, in)``.

    A few codes at once: they lie within two bytes, which together are a row number of a table.
    MLX's CPU goes bit by bit instead, five times as slow, in three times the memory.

    Args:
        codes: uint32 ``(…, in · bits / 32)``.
        bits: of a code.
    """
    outer = codes.shape[:-1]
    width = bits * _AT_ONCE[bits]  # bits that are looked up at once
    count = _BYTES[bits]
    parts = codes.view(mx.uint8).reshape(*outer, -1, count).astype(mx.uint16)
    rows = []
    for start in range(0, 8 * count, width):
        byte, shift = divmod(start, 8)
        in_next = width + shift - 8  # bits that lie in the next byte
        low = parts[..., byte] >> shift
        high = parts[..., byte + 1] & (2**in_next - 1)
        rows.append(low | high << (8 - shift))
    numbers = mx.take(mx.array(_numbers(bits)), mx.stack(rows, -1), axis=0)
    return numbers.view(mx.float32).reshape(*outer, -1)


@cache
def _numbers(bits: int) -> np.ndarray:
    """Return the codes in every run that is looked up at once, as numbers.

    A uint64 holds two float32 numbers: ``(2^width,)`` of one, ``(2^width, 2)`` for runs of four.
    """
    count = _AT_ONCE[bits]
    runs = np.arange(2 ** (bits * count))[:, None]
    codes = runs >> bits * np.arange(count) & (2**bits - 1)  # (2^width, count)
    return np.squeeze(codes.astype(np.float32).view(np.uint64))


affine = Unpack(
    name="qlab_affine",
    names=("scales", "biases"),
    value="static_cast<T>(code) * scales[group] + biases[group]",
    plain=_plain_affine,
    in_weight_dtype=True,
    backends=("cuda",),  # Metal's own kernel is as fast as its memory
)
