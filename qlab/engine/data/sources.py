"""Where rows come from: lists, ``datasets`` sets, data frames, files and running text.

``tokenize`` and ``text`` call it. It returns the rows as they are, unchecked, since only the whole
list of faults helps a user.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qlab.engine.data.conversation import Fault, type_name
from qlab.errors import DataError, nearest
from qlab.runtime.paths import users_path

KINDS = (".jsonl", ".json", ".csv", ".parquet", ".txt")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_CHOICES = "give a list of dicts or strings, a datasets set, a data frame, or a path"
_LONGEST_PATH = 1024  # characters; what is longer is text
_MOST_NAMED = 8  # files of a folder that a message lists


class Text(str):
    """Running text, to be cut into rows as long as they may be."""


def rows_of(data: Any, plain: bool = False) -> Iterable[Any] | Text:
    """Return the rows of any data, unchecked, or running text.

    In place of a line that cannot be read stands its ``Fault``.

    Args:
        data: a list or other iterable of strings and dicts; a ``datasets`` set; a data frame; a
            dict of columns; a path of a ``.jsonl``, ``.json``, ``.csv``, ``.parquet`` or ``.txt``
            file; or text.
        plain: whether a file of another kind is text, too.

    Raises:
        DataError: it is none of these, or a file is missing, empty, of another kind or broken as a
            whole.
    """
    path = path_of(data)
    if path is not None:
        return _file(path, plain)
    if isinstance(data, str):
        if not data.strip():
            raise DataError("The text is empty; give at least a few sentences.")
        return Text(data)
    if isinstance(data, Mapping):
        return _columns(data)
    if hasattr(data, "to_dict") and hasattr(data, "columns"):  # a data frame
        return data.to_dict("records")
    if hasattr(data, "column_names"):  # a datasets set
        # Arrow gives every row the keys of all rows, None where it had none
        return (_without_none(row) for row in data)
    if not isinstance(data, Iterable) or isinstance(data, (bytes, bytearray, set, frozenset)):
        raise DataError(f"The data is {type_name(data)}; {_CHOICES}.")
    return data


def path_of(data: Any) -> Path | None:
    """Return the path that data is read from, if it is one."""
    if isinstance(data, Path):
        return users_path(data, DataError)
    if isinstance(data, str) and _is_path(data):
        return users_path(data, DataError)
    return None


def _is_path(text: str) -> bool:
    """Whether a string means a file: one line that names one, or looks like a name."""
    if "\n" in text or not text.strip() or len(text) > _LONGEST_PATH:
        return False
    path = Path(text)
    if path.suffix.lower() in KINDS or _exists(path):
        return True
    if _HUB_ID.fullmatch(text) and not text.startswith((".", "/")):
        hint = f"If it is a set on the hub, give datasets.load_dataset({text!r})"
        raise DataError(f"{text!r} is neither text nor a file. {hint}.")
    is_one_word = not re.search(r"\s", text)
    has_path_marks = "/" in text or "\\" in text or "." in text.strip(".")
    return is_one_word and has_path_marks


def _exists(path: Path) -> bool:
    """Whether a file stands there; a long line of text cannot be the name of one."""
    try:
        return users_path(path, DataError).exists()
    except DataError:
        return False


def _columns(data: Mapping[Any, Any]) -> list[dict[Any, Any]]:
    """Rows of a dict of columns."""
    if data and all(hasattr(part, "column_names") for part in data.values()):
        names = ", ".join(map(str, data))
        one = f"give one of them, such as data[{next(iter(data))!r}]"
        raise DataError(f"The data is a set of splits ({names}); {one}.")
    if not data or not all(isinstance(column, (list, tuple)) for column in data.values()):
        choices = "a list of dicts, one for each row, or a dict of columns, each a list"
        raise DataError(f"The data is one dict; give {choices}.")
    sizes = {key: len(column) for key, column in data.items()}
    if len(set(sizes.values())) > 1:
        each = ", ".join(f"{key!r} has {size}" for key, size in sizes.items())
        raise DataError(f"The columns differ in length: {each}.")
    return [dict(zip(data, values, strict=True)) for values in zip(*data.values(), strict=True)]


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_none(inner) for inner in value]
    return value


# --- files ----------------------------------------------------------------------------------------


def _file(path: Path, plain: bool) -> Iterable[Any] | Text:
    _check_is_file(path)
    kind = path.suffix.lower()
    if kind not in KINDS and plain:
        kind = ".txt"
    if kind not in KINDS:
        choices = f"give a file of one of the kinds {', '.join(KINDS)}"
        raise DataError(f"{path.name} is not read here; {choices}.")
    try:
        rows = _read(path, kind)
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} is {error.object[error.start]:#04x}"
        raise DataError(f"{path.name} is not UTF-8 text: {byte}.") from None
    except OSError as error:
        raise DataError(f"{path.name} cannot be read: {error}.") from None
    if not rows:
        raise DataError(f"{path.name} is empty.")
    return rows


def _check_is_file(path: Path) -> None:
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix.lower() in KINDS)
        listed = f": {', '.join(inside[:_MOST_NAMED])}" if inside else ""
        raise DataError(f"{path} is a folder; give one file of it{listed}.")
    if not path.is_file():
        neighbours = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"There is no file {str(path)!r}.{nearest(path.name, neighbours)}")


def _read(path: Path, kind: str) -> list[Any] | Text:
    if kind == ".parquet":
        return _parquet(path)
    text = path.read_text(encoding="utf-8-sig")  # Windows programs put a mark at the beginning
    return _READERS[kind](path.name, text)


def _parquet(path: Path) -> list[Any]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        return [_without_none(row) for row in parquet.read_table(path).to_pylist()]
    except arrow.ArrowException as error:
        raise DataError(f"{path.name} is not a Parquet file: {error}.") from None


def _json(name: str, text: str) -> list[Any]:
    if not text.strip():
        return []
    try:
        value = json.loads(text)
    except ValueError as error:
        hint = ""
        if str(error).startswith("Extra data"):
            hint = " It holds several rows, one a line: name it .jsonl."
        raise DataError(f"{name} is not JSON: {error}.{hint}") from None
    is_dict = isinstance(value, dict) and bool(value)
    if is_dict and all(isinstance(column, list) for column in value.values()):
        return _columns(value)
    if not isinstance(value, list):
        raise DataError(f"{name} holds {type_name(value)}; it must hold a list of rows.")
    return value


def _jsonl(name: str, text: str) -> list[Any]:
    lines = text.split("\n")  # other line breaks are allowed inside JSON strings
    return [_json_line(name, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _json_line(name: str, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return Fault(f"line {number} of {name} is not JSON: {error.msg} at column {error.colno}")


def _csv(name: str, text: str) -> list[Any]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows: list[Any] = []
    try:
        for row in reader:
            is_whole = None not in row and None not in row.values()
            if is_whole:
                rows.append(row)
                continue
            columns = len(reader.fieldnames or ())
            cells = f"has not as many cells as the {columns} columns"
            rows.append(Fault(f"line {reader.line_num} of {name} {cells}"))
    except csv.Error as error:
        line = reader.reader.line_num
        rows.append(Fault(f"line {line} of {name} cannot be read, nor what follows: {error}"))
    return rows


def _txt(name: str, text: str) -> Text:
    return Text(text if text.strip() else "")


_READERS = {".json": _json, ".jsonl": _jsonl, ".csv": _csv, ".txt": _txt}


def numbered(rows: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """Yield rows with their numbers, so that an error of the source itself is said with the number.

    Raises:
        DataError: the source failed.
    """
    source = iter(rows)
    number = 0
    while True:
        try:
            row = next(source)
        except StopIteration:
            return
        except DataError:
            raise
        except Exception as error:  # whatever a user's generator raises
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"The data failed at row {number}: {reason}") from error
        yield number, row
        number += 1
