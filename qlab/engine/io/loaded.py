"""``Loaded``: what was opened, and the parts of opening that all layouts share."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn

from qlab.errors import LoadError

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tiktoken.model", "vocab.json")
_LENGTH_NBYTES = 8  # a safetensors file begins with its header's length, little-endian


@dataclass(kw_only=True)
class Loaded:
    """An opened model.

    Attributes:
        module: mlx-lm's model, every parameter evaluated.
        tokenizer: mlx-lm's ``TokenizerWrapper``.
        config: contents of config.json.
        name: short name for headlines.
        notes: what the user should know about this source.
    """

    module: nn.Module
    tokenizer: Any
    config: dict[str, Any]
    name: str
    notes: tuple[str, ...] = ()


def check_safetensors(file: Path) -> None:
    """Refuse a safetensors file that is cut short, before MLX reads past its end.

    Source of the layout: https://github.com/huggingface/safetensors#format

    Raises:
        LoadError: the file is truncated or not safetensors.
    """
    size = file.stat().st_size
    try:
        needed = _needed_nbytes(file, size)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{file} is not a safetensors file, or is cut short: {error}.") from error
    if needed > size:
        raise LoadError(f"{file} is cut short: {size} bytes of {needed}. Fetch it again.")


def _needed_nbytes(file: Path, size: int) -> int:
    """Bytes that a safetensors file has by its header: length, header, arrays."""
    with file.open("rb") as stream:
        header_nbytes = int.from_bytes(stream.read(_LENGTH_NBYTES), "little")
        if header_nbytes > size:
            raise ValueError("its header is longer than the file")
        header = json.loads(stream.read(header_nbytes))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return _LENGTH_NBYTES + header_nbytes + max(ends)


def tokenizer(path: Path) -> Any:
    """Return mlx-lm's tokenizer for a folder.

    Raises:
        LoadError: its files are missing or broken.
    """
    from mlx_lm.utils import load_tokenizer

    if not any((path / name).exists() for name in _TOKENIZERS):
        raise LoadError(f"{path} has no tokenizer (tokenizer.json or tokenizer.model).")
    try:
        return load_tokenizer(path)
    except Exception as error:  # transformers raises many kinds
        raise LoadError(f"The tokenizer in {path} could not be opened: {error}") from error
