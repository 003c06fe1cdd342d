"""Opens models: the embedded demo, a hub id, a local folder, a GGUF file.

Every failure is one clear sentence.

Runs on the MLX thread. Knows no scheme and no panel.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qlab.engine.io.loaded import Loaded, check_safetensors, tokenizer
from qlab.engine.models.skeleton import model_classes
from qlab.errors import LoadError, nearest
from qlab.nn.linear import is_quantized
from qlab.runtime.paths import ASSETS


def load(source: str | Path) -> Loaded:
    """Open a model.

    Args:
        source: ``"demo"``, a local folder, a ``.gguf`` file, or a hub id such as
            ``mlx-community/Qwen3-0.6B-bf16``.

    Raises:
        LoadError: the source is missing, truncated, not a model, or of an unknown architecture.
    """
    text = str(source)
    path = ASSETS / "demo" if text == "demo" else Path(text).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise LoadError(
                f"{text} is a file; a model is a folder with config.json, or a .gguf file."
            )
        from qlab.engine.io.gguf import load_gguf

        return load_gguf(path)
    if not path.is_dir():
        path = _download(text)
    return _open_folder(
        path, "demo" if text == "demo" else path.resolve().name if Path(text).exists() else text
    )


def _download(source: str) -> Path:
    """Fetch a hub repository, or say why there is nothing to open."""
    looks_local = (
        source.startswith((".", "/", "~")) or source.count("/") != 1 or source.endswith(".gguf")
    )
    if looks_local:
        folder = Path(source).expanduser().parent
        beside = [p.name for p in folder.iterdir()] if folder.is_dir() else []
        hint = nearest(Path(source).name, [*beside, "demo"])
        raise LoadError(
            f"There is no model at {source!r}: neither a folder, a .gguf file, nor a hub id (owner/name).{hint}"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "*.tiktoken"]
    try:
        return Path(snapshot_download(source, allow_patterns=wanted))
    except RepositoryNotFoundError as error:
        raise LoadError(
            f"The hub has no model {source!r}, or it is private and you are not logged in."
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise LoadError(
            f"{source!r} is not a local folder, and the hub could not be reached ({type(error).__name__}). "
            "Check the spelling and the network, or give the path of a folder."
        ) from error


def _open_folder(path: Path, name: str) -> Loaded:
    config = _config(path)
    if "qlab" in config:
        from qlab.engine.io.save import open_packed

        module = open_packed(path, config)
    else:
        module = _module(path, config)
    notes = ()
    if any(is_quantized(leaf) for leaf in module.modules()):
        notes = (
            "This model is already quantized: errors are measured against it, not against its 16-bit original.",
        )
    return Loaded(module, tokenizer(path), config, name, notes)


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        raise LoadError(f"{path} has no config.json, so it is not a model folder.") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise LoadError(f"{path / 'config.json'} is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise LoadError(f"{path / 'config.json'} holds no settings.")
    model_classes(config)
    return config


def _module(path: Path, config: dict[str, Any]) -> nn.Module:
    from mlx_lm.utils import load_model

    files = sorted(path.glob("model*.safetensors"))
    if not files:
        raise LoadError(f"{path} has a config.json but no weights (model*.safetensors).")
    for file in files:
        check_safetensors(file)
    try:
        module, _ = load_model(path)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise LoadError(
            f"The weights in {path} do not fit config.json ({config['model_type']}): {error}"
        ) from error
    mx.eval(module.parameters())
    return module
