"""Reads the header of a GGUF file and checks it against the file's size, before MLX maps the file.

MLX trusts the header, so garbage would end the process. Source of the layout: the GGUF v3
specification (ggml docs/gguf.md).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

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


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a GGUF file.

    Its name, type name, shape as GGUF has it (fastest first) and size.
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
            if stream.read(4) != b"GGUF":
                raise LoadError(f"{path} is not a GGUF file: it does not begin with 'GGUF'.")
            version, tensors, pairs = _unpack(stream, "<IQQ")
            if version not in (2, 3):
                raise LoadError(f"{path} is GGUF version {version}; versions 2 and 3 can be read.")
            alignment = 32
            for _ in range(_count(pairs)):
                key = _string(stream)
                value = _value(stream, _unpack(stream, "<I")[0])
                alignment = value if key == "general.alignment" else alignment
            found = [_tensor(stream, path) for _ in range(_count(tensors))]
            start = round_up(stream.tell(), int(alignment))
        except (
            struct.error,
            ValueError,
            OverflowError,
            TypeError,
            ZeroDivisionError,
            UnicodeDecodeError,
        ) as error:
            raise LoadError(f"{path} is cut short or damaged in its header: {error}.") from error
    end = start + max((offset + info.nbytes for offset, info in found), default=0)
    if end > size:
        raise LoadError(f"{path} is cut short: {size} bytes of {end}. Fetch it again.")
    return tuple(info for _, info in found)


def _tensor(stream: BinaryIO, path: Path) -> tuple[int, TensorInfo]:
    name = _string(stream)
    (rank,) = _unpack(stream, "<I")
    if rank > 4:
        raise ValueError(f"tensor {name!r} has {rank} dimensions")
    shape = _unpack(stream, f"<{rank}Q")
    kind, offset = _unpack(stream, "<IQ")
    type_name, block, nbytes = _TYPES.get(kind, (f"number {kind}", 1, 1))
    if type_name not in READABLE:
        raise LoadError(
            f"{path}: tensor {name!r} is of type {type_name}, which MLX cannot read; it reads {', '.join(READABLE)}. "
            "Convert the file, for example to Q8_0 or F16."
        )
    return offset, TensorInfo(name, type_name, shape, prod(shape) // block * nbytes)


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


def _value(stream: BinaryIO, kind: int):
    if kind == _STRING:
        return _string(stream)
    if kind == _ARRAY:
        inner, length = _unpack(stream, "<IQ")
        return [_value(stream, inner) for _ in range(_count(length))]
    if kind not in _SCALARS:
        raise ValueError(f"value type {kind} does not exist")
    return _unpack(stream, "<" + _SCALARS[kind])[0]
