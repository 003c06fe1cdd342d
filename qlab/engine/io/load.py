"""Opens models with their weights: the embedded demo, a hub id, a local folder, a GGUF file.

``qlab.load`` calls it on the MLX thread. Every failure is one clear sentence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qlab.engine.io.gguf import load_gguf
from qlab.engine.io.loaded import Loaded, check_safetensors, tokenizer
from qlab.engine.io.save import open_packed
from qlab.engine.io.source import fetch_model, find, read_settings
from qlab.engine.models.skeleton import model_classes
from qlab.errors import LoadError
from qlab.nn.linear import is_quantized

_QUANTIZED_NOTE = (
    "This model is already quantized: errors are measured against it, not against its 16-bit "
    "original."
)


def load(source: str | Path) -> Loaded:
    """Open a model.

    Args:
        source: ``"demo"``, a local folder, a ``.gguf`` file, or a hub id such as
            ``mlx-community/Qwen3-0.6B-bf16``.

    Raises:
        LoadError: the source is missing, truncated, not a model, or of an unknown architecture.
    """
    place = find(source)
    path = place.path
    if path is None:
        path = fetch_model(place.text)
    if path.is_dir():
        return _open_folder(path, place.name)
    if path.suffix != ".gguf":
        kinds = "a model is a folder with config.json, or a .gguf file"
        raise LoadError(f"{place.text} is a file; {kinds}.")
    return load_gguf(path)


def _open_folder(path: Path, name: str) -> Loaded:
    config = read_settings(path / "config.json", "a model folder")
    model_classes(config)  # refuses an unknown architecture before any weight is read
    module = open_packed(path, config) if "qlab" in config else _module(path, config)
    quantized = any(is_quantized(leaf) for leaf in module.modules())
    notes = (_QUANTIZED_NOTE,) if quantized else ()
    return Loaded(module=module, tokenizer=tokenizer(path), config=config, name=name, notes=notes)


def _module(path: Path, config: dict[str, Any]) -> nn.Module:
    """Open a folder in mlx-lm's layout."""
    from mlx_lm.utils import load_model

    files = sorted(path.glob("model*.safetensors"))
    if not files:
        raise LoadError(f"{path} has a config.json but no weights (model*.safetensors).")
    for file in files:
        check_safetensors(file)
    try:
        module, _ = load_model(path)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        kind = config["model_type"]
        raise LoadError(
            f"The weights in {path} do not fit config.json ({kind}): {error}"
        ) from error
    mx.eval(module.parameters())
    return module
