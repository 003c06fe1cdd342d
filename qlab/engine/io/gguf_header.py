"""Reads the header of a GGUF file and checks it against the file's size, before MLX maps the file.

``gguf`` calls it. MLX trusts the header, so garbage would end the process. Source of the layout:
the GGUF v3 specification (ggml docs/gguf.md): magic, version, counts; key-value pairs; tensors'
names, shapes, types and offsets; padding to the alignment; the tensors' bytes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from qlab.core.arithmetic import round_up
from qlab.errors import LoadError

# type number → (name, weights in a block, bytes of a block)
_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
READABLE = ("F32", "F16", "Q4_0", "Q4_1", "Q8_0")
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING = 8
_ARRAY = 9
_LIMIT = 1 << 24  # no count in a real header is larger
_MOST_DIMENSIONS = 4
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # bytes, unless general.alignment says another
# whatever reading garbage as numbers, lengths and text can raise
_DAMAGE = (struct.error, ValueError, OverflowError, TypeError, ZeroDivisionError)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a GGUF file.

    Attributes:
        name: GGUF's, such as ``blk.0.attn_q.weight``.
        type: name of its storage, such as ``Q4_0``.
        shape: as GGUF has it: the dimension that lies together in memory comes first.
        nbytes: of its data.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int


def read_header(path: Path) -> tuple[TensorInfo, ...]:
    """Return the tensors of a GGUF file.

    Raises:
        LoadError: wrong magic, unsupported version, a type that MLX cannot read, or a file that is
            cut short.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        try:
            tensors, start = _read(stream, path)
        except _DAMAGE as error:
            raise LoadError(f"{path} is cut short or damaged in its header: {error}.") from error
    ends = [offset + info.nbytes for offset, info in tensors]
    needed = start + max(ends, default=0)
    if needed > size:
        raise LoadError(f"{path} is cut short: {size} bytes of {needed}. Fetch it again.")
    return tuple(info for _, info in tensors)


def _read(stream: BinaryIO, path: Path) -> tuple[list[tuple[int, TensorInfo]], int]:
    """Return tensors with their offsets, and the byte from which offsets count."""
    if stream.read(4) != b"GGUF":
        raise LoadError(f"{path} is not a GGUF file: it does not begin with 'GGUF'.")
    version, tensor_count, pair_count = _unpack(stream, "<IQQ")
    if version not in _VERSIONS:
        raise LoadError(f"{path} is GGUF version {version}; versions 2 and 3 can be read.")
    alignment = _alignment(stream, _count(pair_count))
    tensors = [_tensor(stream, path) for _ in range(_count(tensor_count))]
    return tensors, round_up(stream.tell(), alignment)


def _alignment(stream: BinaryIO, pairs: int) -> int:
    """Read past all key-value pairs; return the alignment of the data in bytes."""
    alignment = _ALIGNMENT
    for _ in range(pairs):
        key = _string(stream)
        (kind,) = _unpack(stream, "<I")
        value = _value(stream, kind)
        if key == "general.alignment":
            alignment = int(value)
    return alignment


def _tensor(stream: BinaryIO, path: Path) -> tuple[int, TensorInfo]:
    """Return the offset of a tensor's data, and what it is."""
    name = _string(stream)
    (rank,) = _unpack(stream, "<I")
    if rank > _MOST_DIMENSIONS:
        raise ValueError(f"tensor {name!r} has {rank} dimensions")
    shape = _unpack(stream, f"<{rank}Q")
    kind, offset = _unpack(stream, "<IQ")
    type_name, block_size, block_nbytes = _TYPES.get(kind, (f"number {kind}", 1, 1))
    if type_name not in READABLE:
        raise LoadError(
            f"{path}: tensor {name!r} is of type {type_name}, which MLX cannot read; it reads "
            f"{', '.join(READABLE)}. Convert the file, for example to Q8_0 or F16."
        )
    nbytes = prod(shape) // block_size * block_nbytes
    return offset, TensorInfo(name, type_name, shape, nbytes)


def _unpack(stream: BinaryIO, layout: str) -> tuple:
    return struct.unpack(layout, stream.read(struct.calcsize(layout)))


def _count(n: int) -> int:
    if n > _LIMIT:
        raise ValueError(f"a count of {n} is not possible")
    return n


def _string(stream: BinaryIO) -> str:
    length = _count(_unpack(stream, "<Q")[0])
    data = stream.read(length)
    if len(data) < length:
        raise ValueError("a string ends after the file does")
    return data.decode()


def _value(stream: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(stream)
    if kind == _ARRAY:
        inner, length = _unpack(stream, "<IQ")
        return [_value(stream, inner) for _ in range(_count(length))]
    if kind not in _SCALARS:
        raise ValueError(f"value type {kind} does not exist")
    (value,) = _unpack(stream, f"<{_SCALARS[kind]}")
    return value
