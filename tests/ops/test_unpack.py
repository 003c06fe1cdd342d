"""Codes → weights: MLX's operations, and a kernel that is used only where its numbers are the same."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from qlab.ops import unpack
from qlab.ops.unpack import affine
from qlab.ops.unpack import lookup
from tests.tiny import on_mlx

TABLE = np.linspace(-1, 1, 16, dtype=np.float32)


def kernel(wrong: float = 1.0):
    """What a GPU's kernel does, by MLX's operations, from what it is given."""

    def run(*, inputs, template, grid, threadgroup, output_shapes, output_dtypes):
        codes, *arrays = inputs
        given = dict(template)
        bits, dtype = given["BITS"], given["T"]
        assert grid[0] == codes.size and grid[0] % threadgroup[0] == 0 and dtype == output_dtypes[0]
        each = (np.array(codes).reshape(-1, 1) >> np.arange(0, 32, bits, dtype=np.uint32)) & (
            2**bits - 1
        )
        group = mx.array(np.arange(codes.size) // given["WORDS"])[:, None]
        if len(arrays) == 2 and arrays[1].shape == (16,):
            made = arrays[1][mx.array(each)] * arrays[0].reshape(-1)[group]
        else:
            scales, biases = (x.reshape(-1)[group] for x in arrays)
            made = mx.array(each).astype(dtype) * scales + biases
        return [(made * wrong).astype(dtype).reshape(output_shapes[0])]

    return run


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@on_mlx
def test_both_ways_by_a_table_give_the_same_numbers(group_size, dtype, monkeypatch):
    codes = mx.random.randint(0, 2**31 - 1, (6, 32)).astype(mx.uint32)
    scales = mx.random.uniform(0.1, 2, (6, 256 // group_size))
    plain = lookup(TABLE)(codes, [scales], 4, group_size, dtype)
    assert plain.shape == (6, 256) and plain.dtype == dtype
    monkeypatch.setattr(unpack, "kernel_of", lambda *_: kernel())
    assert mx.array_equal(lookup(TABLE)(codes, [scales], 4, group_size, dtype), plain)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@on_mlx
def test_both_ways_of_affine_codes_give_the_same_numbers_and_odd_bits_go_mlxs_way(
    group_size, bits, monkeypatch
):
    codes, *arrays = mx.quantize(mx.random.normal((6, 256)), group_size, bits)
    calls = []
    monkeypatch.setattr(unpack, "kernel_of", lambda *given: calls.append(given) or kernel())
    found = affine(codes, arrays, bits, group_size, mx.float32)
    assert mx.allclose(found, mx.dequantize(codes, *arrays, group_size, bits), atol=1e-6)
    assert len(calls) == (bits != 3)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("bits", [3, 5, 6])
@pytest.mark.parametrize("shape", [(6, 256), (3, 5, 96), (7, 32)], ids=str)
@on_mlx
def test_codes_that_do_not_divide_a_byte_are_mlxs_numbers_bit_for_bit(shape, bits, dtype):
    codes, *arrays = mx.quantize(mx.random.normal(shape).astype(dtype), 32, bits)
    found = affine(codes, arrays, bits, 32, dtype)
    assert found.dtype == dtype and mx.array_equal(found, mx.dequantize(codes, *arrays, 32, bits))


@pytest.mark.parametrize("way", [affine, lookup(TABLE)], ids=lambda way: way.name)
@on_mlx
def test_a_kernel_is_used_only_if_its_numbers_are_right(way):
    def broken(**_):
        raise RuntimeError("no compiler here")

    right = (
        kernel()
        if way.name == "qlab_lookup"
        else lambda **given: [mx.dequantize(*given["inputs"], 32, 4)]
    )
    assert way.agrees(right, 4, mx.float32)
    assert not way.agrees(kernel(wrong=1.001), 4, mx.float32)
    assert not way.agrees(broken, 4, mx.float32)
    assert unpack.kernel_of(way, 4, mx.float32, False) is None


@on_mlx
def test_the_kernel_for_metal_is_one_function_of_its_three_inputs(monkeypatch):
    """There is no such device here: what MLX makes of the source is looked at instead."""
    made = []
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(unpack.Unpack, "agrees", lambda *_: True)
    assert (
        unpack.kernel_of.__wrapped__(affine, 4, mx.bfloat16, True) is None
    )  # MLX's own serves there
    fused = unpack.kernel_of.__wrapped__(lookup(TABLE), 4, mx.bfloat16, True)
    monkeypatch.undo()
    monkeypatch.setattr(unpack, "kernel_of", lambda *_: fused)
    run = lambda codes, scales: lookup(TABLE)(codes, [scales], 4, 64, mx.bfloat16)  # noqa: E731
    mx.export_function(made.append, run, mx.zeros((4, 32), mx.uint32), mx.zeros((4, 4)))
    found = next(x for x in made if x.get("name") == "CustomKernel")
    assert found["outputs"][0][1:] == ((4, 256), mx.bfloat16)
    source = found["arguments"][1]
    for part in (
        "const device uint32_t* codes",
        "const device float* scales",
        "device bfloat16_t* out",
        "reinterpret_cast<device Run*>(out)",
        "thread_position_in_grid",
    ):
        assert part in source, source


@on_mlx
def test_who_turns_to_another_device_is_not_served_by_the_kernel_of_the_one_before(monkeypatch):
    way, on_gpu = lookup(TABLE), []
    codes, scales = mx.zeros((4, 32), mx.uint32), mx.zeros((4, 4))
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(unpack.Unpack, "agrees", lambda *_: True)
    monkeypatch.setattr(unpack.Unpack, "fused", lambda *_: on_gpu.append(True))
    for device, calls in ((mx.cpu, 0), (mx.gpu, 1), (mx.cpu, 1)):
        monkeypatch.setattr(mx, "default_device", lambda device=device: mx.Device(device, 0))
        way(codes, [scales], 4, 64, mx.float32)
        assert len(on_gpu) == calls
