"""Where qlab keeps what it ships and what it remembers."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """Folder for the renamed library.

    The user's cache, or a private temporary one if that cannot be written.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    folders = [Path(tempfile.gettempdir()) / f"qlab-{os.getuid()}"]
    if base.is_absolute():  # not so for a user without a home, as in some containers
        folders.insert(0, base / "qlab")
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            ours = folder.stat().st_uid == os.getuid()  # or another user could plant a library
        except OSError:
            continue
        if ours and os.access(folder, os.W_OK):
            return folder
    raise OSError("no folder for the renamed library can be written")


ASSETS = Path(__file__).parent.parent / "assets"
