"""Writes files and folders whole or not at all; all that qlab writes to disk goes through here.

What is new is written beside its place, brought to the disk (``fsync``), and only then renamed into
place. So a reader sees the old or the new, and never half of one: not after a crash, not on a
full disk, not while another process writes the same. Calls no MLX and knows no file format.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from qlab.errors import SaveError
from qlab.runtime.paths import users_path

_MOST_NAMED = 3  # names of foreign files that a message lists
_NOT_COUNTED = ".DS_Store"  # the Finder puts one into every folder that it shows


def write_file(path: str | Path, fill: Callable[[Path], object]) -> Path:
    """Write a file whole or not at all.

    Args:
        path: where; folders on the way are made, and a file that stands there is replaced.
        fill: called with the path of a new file of the same name in a folder beside it, and writes
            that file.

    Returns:
        The absolute path.

    Raises:
        SaveError: it cannot be written (also an ``OSError``); what stood there is untouched.

    Example:
        >>> write_file("notes/today.txt", lambda new: new.write_text("one"))
    """
    path = users_path(path, SaveError).absolute()
    with _room_beside(path) as room:
        new = room / path.name
        fill(new)
        _to_disk(new)
        os.replace(new, path)
        _to_disk(path.parent)
    return path


def write_folder(
    path: str | Path, fill: Callable[[Path], object], replaceable: Iterable[str]
) -> Path:
    """Write a folder whole or not at all.

    Args:
        path: where; folders on the way are made.
        fill: called with a new empty folder beside it, and writes the files into that.
        replaceable: names, or patterns of names. A folder that stands there already is replaced if
            it holds nothing else: another's files are never deleted.

    Returns:
        The absolute path.

    Raises:
        SaveError: the place holds other files, or cannot be written; what stood there is untouched.

    Example:
        >>> write_folder("model", lambda new: (new / "config.json").write_text("{}"), ["*.json"])
    """
    path = users_path(path, SaveError).absolute()
    _refuse_foreign_files(path, tuple(replaceable))
    with _room_beside(path) as room:
        new = room / "new"
        new.mkdir()
        fill(new)
        for entry in new.rglob("*"):
            _to_disk(entry)
        _to_disk(new)
        _exchange(path, new, room / "old")
        _to_disk(path.parent)
    return path


def write_page(path: str | Path, text: str) -> str:
    """Write a page of text (UTF-8), and return its path as it was given.

    Raises:
        SaveError: it cannot be written, or its folder does not exist.
    """
    path = Path(path)
    folder = users_path(path, SaveError).parent
    if not folder.is_dir():  # a new folder would hide a typo in the path of a page
        raise SaveError(f"{path} cannot be written: No such file or directory ({folder}).")
    write_file(path, lambda new: new.write_text(text, encoding="utf-8"))
    return str(path)


def _refuse_foreign_files(path: Path, replaceable: tuple[str, ...]) -> None:
    """Raise if something stands at ``path`` that is not of the kind that is to be written."""
    if path.exists() and not path.is_dir():
        raise SaveError(f"{path} is a file; give the name of a folder.")
    if not path.exists():
        return
    names = sorted(file.name for file in path.iterdir() if file.name != _NOT_COUNTED)
    foreign = [
        name for name in names if not any(fnmatchcase(name, pattern) for pattern in replaceable)
    ]
    if foreign:
        listed = ", ".join(foreign[:_MOST_NAMED])
        raise SaveError(f"{path} holds other files too ({listed}); give the name of a new folder.")


@contextmanager
def _room_beside(path: Path) -> Iterator[Path]:
    """Give a temporary folder on the disk of ``path``, so that a rename from it is one operation.

    Turns what the system says inside into one ``SaveError``; MLX says a full disk as RuntimeError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as room:
            yield Path(room)
    except SaveError as error:
        if error.__cause__ is None:
            raise  # a refusal by what was called inside: it has said all
        # a write within a write: the outer one says the place and the free room
        raise _not_written(path, error.__cause__) from error.__cause__
    except (OSError, RuntimeError) as error:
        raise _not_written(path, error) from error


def _not_written(path: Path, reason: BaseException) -> SaveError:
    message = f"{path} was not written ({reason})"
    if not path.parent.is_dir():
        return SaveError(f"{message}.")
    free = shutil.disk_usage(path.parent).free
    return SaveError(f"{message}; {free / 1e9:.2f} GB are free there.")


def _exchange(path: Path, new: Path, old: Path) -> None:
    """Rename ``new`` to ``path``, and what stands there to ``old``; or leave all as it was."""
    if path.exists():
        path.rename(old)
    try:
        new.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise


def _to_disk(path: Path) -> None:
    """Bring a file's bytes, or a folder's list of names, to the disk.

    Otherwise a rename may outlive a loss of power, and the bytes that it names may not.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
