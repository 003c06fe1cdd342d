"""Where qlab keeps what it ships and what it remembers."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

ASSETS = Path(__file__).parent.parent / "assets"  # the demo, texts, scripts


def cache_folder() -> Path:
    """Return the folder for what is remembered: measured peaks, trials, teachers, a renamed BLAS.

    The user's cache, or a private temporary folder if that cannot be written.

    Raises:
        OSError: neither can.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    folders = [Path(tempfile.gettempdir()) / f"qlab-{os.getuid()}"]
    if base.is_absolute():  # not so for a user without a home, as in some containers
        folders.insert(0, base / "qlab")
    for folder in folders:
        if _is_usable(folder):
            return folder
    raise OSError(f"no folder can be written: {' or '.join(map(str, folders))}")


def _is_usable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        is_ours = folder.stat().st_uid == os.getuid()  # or another user could plant a library
    except OSError:
        return False
    return is_ours and os.access(folder, os.W_OK)
