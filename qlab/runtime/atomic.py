"""Writes a folder whole or not at all, never in the place of what is not of its kind; and pages.

Knows not what is in them.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from qlab.errors import SaveError

_SHOWN = 3


def write_folder(path: Path, fill: Callable[[Path], None], own: Iterable[str]) -> None:
    """Fill a new folder and put it in the place of the old one.

    Args:
        path: of the folder. An existing one is replaced if it is empty or holds nothing but
            ``own``.
        fill: called with an empty folder beside it.
        own: names of what such a folder may hold, or patterns of them.

    Raises:
        SaveError: the place is taken by something else, or cannot be written; what stood there is
            untouched.
    """
    path = path.expanduser().absolute()
    if path.is_dir():
        names = sorted(file.name for file in path.iterdir() if file.name != ".DS_Store")
        others = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in own)]
        if others:
            raise SaveError(
                f"{path} holds other files too ({', '.join(others[:_SHOWN])}); give the name of a new folder."
            )
    elif path.exists():
        raise SaveError(f"{path} is a file; give the name of a folder.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            made = Path(folder) / "made"
            old = Path(folder) / "old"
            made.mkdir()
            fill(made)
            for file in filter(
                Path.is_file, made.rglob("*")
            ):  # a rename may otherwise outlive what it names
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
            if path.exists():
                path.rename(old)
            try:
                made.rename(path)
            except OSError:
                if old.exists():
                    old.rename(path)
                raise
    except (OSError, RuntimeError) as error:
        free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        raise SaveError(
            f"{path} was not written ({error}); {free / 1e9:.2f} GB are free there."
        ) from error


def write_page(path: str | Path, text: str) -> str:
    """Write a file and return its path.

    Raises:
        SaveError: it cannot be written.
    """
    try:
        Path(path).expanduser().write_text(text, encoding="utf-8")
    except OSError as error:
        raise SaveError(f"{path} cannot be written: {error.strerror}.") from None
    return str(path)
