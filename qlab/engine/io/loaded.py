"""What was opened: module, tokenizer, config and where they came from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn

from qlab.errors import LoadError


@dataclass
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

    Raises:
        LoadError: the file is truncated or not safetensors.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > size:
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
        end = max(
            entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"
        )
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise LoadError(f"{file} is not a safetensors file, or is cut short: {error}.") from error
    if 8 + length + end > size:
        raise LoadError(f"{file} is cut short: {size} bytes of {8 + length + end}. Fetch it again.")


def tokenizer(path: Path) -> Any:
    """Return mlx-lm's tokenizer for a folder.

    Raises:
        LoadError: its files are missing or broken.
    """
    from mlx_lm.utils import load_tokenizer

    if not any(
        (path / name).exists()
        for name in ("tokenizer.json", "tokenizer.model", "tiktoken.model", "vocab.json")
    ):
        raise LoadError(f"{path} has no tokenizer (tokenizer.json or tokenizer.model).")
    try:
        return load_tokenizer(path)
    except Exception as error:  # transformers raises many kinds
        raise LoadError(f"The tokenizer in {path} could not be opened: {error}") from error
