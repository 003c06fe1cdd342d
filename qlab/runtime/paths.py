"""Where qlab keeps what it ships and what it remembers."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from reprlib import Repr

from qlab.errors import LoadError, QlabError

ASSETS = Path(__file__).parent.parent / "assets"  # the demo, texts, scripts

_SHORT = Repr()
_SHORT.maxstring = 80


def users_path(given: str | Path, error: type[QlabError] = LoadError) -> Path:
    """Return the path that a user gives, ``~`` expanded; it may exist or not.

    Args:
        given: by the user; a text may be no path at all.
        error: to raise, of the kind that the caller promises.

    Raises:
        QlabError: the system cannot even look for it: a name is too long, a folder on the way is
            closed, or there is no user ``~name``.
    """
    try:
        path = Path(given).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (OSError, RuntimeError, ValueError) as reason:
        why = reason.strerror if isinstance(reason, OSError) else str(reason)
        raise error(f"{_SHORT.repr(str(given))} cannot be a path here: {why}.") from None
    return path


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
