"""What a model's source means: the demo, a local folder or file, or a repository of the hub.

The one rule for paths, the one reader of JSON settings and the one fetch from the hub: ``load``
opens weights through it, ``config_file`` only a structure, ``engine/adapt/files`` an adapter's
settings.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlab.errors import LoadError, nearest
from qlab.runtime.paths import ASSETS, users_path

DEMO = "demo"
_WEIGHTS = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "*.tiktoken"]


@dataclass(frozen=True)
class Source:
    """A model's source, before anything is fetched or opened.

    Attributes:
        text: what the user gave.
        path: on this machine; None if nothing is there, so that the hub is asked.
        name: short name for headlines.
    """

    text: str
    path: Path | None
    name: str

    @property
    def reference(self) -> str:
        """What opens the same model from any folder: ``demo``, an absolute path, or a hub id."""
        if self.text == DEMO or self.path is None:
            return self.text
        return str(self.path.resolve())


def find(source: str | Path) -> Source:
    """Say what a source is. Fetches nothing.

    Args:
        source: ``"demo"``, a path, or a hub id such as ``mlx-community/Qwen3-0.6B-bf16``. What
            exists on this machine is taken from there.

    Raises:
        LoadError: it is no text and no path.
    """
    if not isinstance(source, (str, Path)) or not str(source).strip():
        choices = "give a folder, a .gguf file, a hub id or 'demo'"
        raise LoadError(f"source={source!r} is not legal; {choices}.")
    text = str(source)
    if text == DEMO:
        return Source(text, ASSETS / "demo", DEMO)
    path = users_path(text)
    if path.exists():
        return Source(text, path, path.resolve().name)
    return Source(text, None, text)


def read_settings(file: Path, kind: str) -> dict[str, Any]:
    """Read a JSON file of settings.

    Args:
        file: such as a config.json.
        kind: what its folder should be, for the error: ``"a model folder"``.

    Raises:
        LoadError: there is no such file, or it is not JSON, or holds something else than settings.
    """
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LoadError(f"{file.parent} has no {file.name}, so it is not {kind}.") from None
    except (ValueError, OSError) as error:
        raise LoadError(f"{file} is not JSON: {error}.") from error
    if not isinstance(settings, dict):
        raise LoadError(f"{file} holds no settings, but a {type(settings).__name__}.")
    return settings


def fetch_model(repository: str) -> Path:
    """Fetch a model's folder from the hub (or find it in the hub's cache), and return its path.

    Raises:
        LoadError: not a hub id, no such model, or the hub cannot be reached.
    """
    if not _may_be_hub_id(repository):
        folder = users_path(repository).parent
        neighbours = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        hint = nearest(Path(repository).name, [*neighbours, DEMO])
        choices = "neither a folder, a .gguf file, nor a hub id (owner/name)"
        raise LoadError(f"There is no model at {repository!r}: {choices}.{hint}")
    from huggingface_hub import snapshot_download

    with _hub_errors(repository, "give the path of a folder"):
        return Path(snapshot_download(repository, allow_patterns=_WEIGHTS))


def fetch_config(repository: str) -> Path:
    """Fetch only a model's config.json from the hub, and return its path.

    Raises:
        LoadError: not a hub id, no such model, or the hub cannot be reached.
    """
    if not _may_be_hub_id(repository):
        choices = "neither a config.json, a folder with one, nor a hub id (owner/name)"
        raise LoadError(f"There is no config at {repository!r}: {choices}.")
    from huggingface_hub import hf_hub_download

    with _hub_errors(repository, "give a config.json"):
        return Path(hf_hub_download(repository, "config.json"))


def _may_be_hub_id(text: str) -> bool:
    looks_local = text.startswith((".", "/", "~")) or text.endswith((".json", ".gguf"))
    return text.count("/") == 1 and not looks_local


@contextmanager
def _hub_errors(repository: str, otherwise: str) -> Iterator[None]:
    """Say every failure of the hub in one sentence."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    unreachable = f"{repository!r} is not a local folder, and the hub could not be reached"
    advice = f"Check the spelling and the network, or {otherwise}."
    try:
        yield
    except RepositoryNotFoundError as error:
        private = "or it is private and you are not logged in"
        raise LoadError(f"The hub has no model {repository!r}, {private}.") from error
    except LocalEntryNotFoundError as error:  # not in the cache, and the hub did not answer
        raise LoadError(f"{unreachable}. {advice}") from error
    except EntryNotFoundError as error:
        raise LoadError(f"{repository!r} on the hub has no config.json.") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise LoadError(f"{unreachable} ({type(error).__name__}). {advice}") from error
