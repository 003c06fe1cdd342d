"""Where rows come from: lists, ``datasets`` sets, data frames, files and running text.

Knows no tokenizer.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qlab.engine.data.conversation import Fault, a
from qlab.errors import DataError, nearest

KINDS = (".jsonl", ".json", ".csv", ".parquet", ".txt")
_HUB = re.compile(r"[\w.-]+/[\w.-]+")
_LISTED = "give a list of dicts or strings, a datasets set, a data frame, or a path"


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
    if (path := path_of(data)) is not None:
        return _file(path, plain)
    if isinstance(data, str):
        if not data.strip():
            raise DataError("The text is empty; give at least a few sentences.")
        return Text(data)
    if isinstance(data, Mapping):
        return _columns(data)
    if hasattr(data, "to_dict") and hasattr(data, "columns"):  # a data frame
        return data.to_dict("records")
    if hasattr(
        data, "column_names"
    ):  # a datasets set: Arrow gives every row the keys of all rows, None where it had none
        return (_without_none(row) for row in data)
    if not isinstance(data, Iterable) or isinstance(data, (bytes, bytearray, set, frozenset)):
        raise DataError(f"The data is {a(data)}; {_LISTED}.")
    return data


def path_of(data: Any) -> Path | None:
    """Return the path that data is read from, if it is one."""
    return (
        Path(data).expanduser()
        if isinstance(data, Path) or isinstance(data, str) and _is_path(data)
        else None
    )


def _is_path(text: str) -> bool:
    """Whether a string means a file: one line that names one, or looks like a name."""
    if "\n" in text or not text.strip() or len(text) > 1024:
        return False
    if Path(text).suffix.lower() in KINDS or Path(text).expanduser().exists():
        return True
    if _HUB.fullmatch(text) and not text.startswith((".", "/")):
        raise DataError(
            f"{text!r} is neither text nor a file. If it is a set on the hub, give datasets.load_dataset({text!r})."
        )
    return not re.search(r"\s", text) and ("/" in text or "\\" in text or "." in text.strip("."))


def _columns(data: Mapping[Any, Any]) -> list[dict[Any, Any]]:
    if data and all(hasattr(part, "column_names") for part in data.values()):
        first = next(iter(data))
        raise DataError(
            f"The data is a set of splits ({', '.join(map(str, data))}); give one of them, such as data[{first!r}]."
        )
    if not data or not all(isinstance(column, (list, tuple)) for column in data.values()):
        raise DataError(
            "The data is one dict; give a list of dicts, one for each row, or a dict of columns, each a list."
        )
    sizes = {key: len(column) for key, column in data.items()}
    if len(set(sizes.values())) > 1:
        raise DataError(
            f"The columns differ in length: {', '.join(f'{key!r} has {size}' for key, size in sizes.items())}."
        )
    return [dict(zip(data, values, strict=True)) for values in zip(*data.values(), strict=True)]


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value


# --- files ----------------------------------------------------------------------------------------


def _file(path: Path, plain: bool) -> Iterable[Any] | Text:
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix.lower() in KINDS)
        raise DataError(
            f"{path} is a folder; give one file of it{': ' if inside else ''}{', '.join(inside[:8])}."
        )
    if not path.is_file():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"There is no file {str(path)!r}.{nearest(path.name, beside)}")
    kind = path.suffix.lower()
    if kind not in KINDS and plain:
        kind = ".txt"
    if kind not in KINDS:
        raise DataError(
            f"{path.name} is not read here; give a file of one of the kinds {', '.join(KINDS)}."
        )
    try:
        found = (
            _parquet(path)
            if kind == ".parquet"
            else _READERS[kind](path.name, path.read_text(encoding="utf-8-sig"))
        )
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path.name} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}."
        ) from None
    except OSError as error:
        raise DataError(f"{path.name} cannot be read: {error}.") from None
    if not found:
        raise DataError(f"{path.name} is empty.")
    return found


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
        found = json.loads(text)
    except ValueError as error:
        lines = (
            " It holds several rows, one a line: name it .jsonl."
            if str(error).startswith("Extra data")
            else ""
        )
        raise DataError(f"{name} is not JSON: {error}.{lines}") from None
    if (
        isinstance(found, dict)
        and found
        and all(isinstance(column, list) for column in found.values())
    ):
        return _columns(found)
    if not isinstance(found, list):
        raise DataError(f"{name} holds {a(found)}; it must hold a list of rows.")
    return found


def _jsonl(name: str, text: str) -> list[Any]:
    rows = []
    for number, line in enumerate(
        text.split("\n"), 1
    ):  # other line breaks are allowed inside JSON strings
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                rows.append(
                    Fault(
                        f"line {number} of {name} is not JSON: {error.msg} at column {error.colno}"
                    )
                )
    return rows


def _csv(name: str, text: str) -> list[Any]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows: list[Any] = []
    try:
        for row in reader:
            whole = None not in row and None not in row.values()
            columns = f"has not as many cells as the {len(reader.fieldnames or ())} columns"
            rows.append(row if whole else Fault(f"line {reader.line_num} of {name} {columns}"))
    except csv.Error as error:
        rows.append(
            Fault(
                f"line {reader.reader.line_num} of {name} cannot be read, nor what follows: {error}"
            )
        )
    return rows


def _txt(name: str, text: str) -> Text:
    return Text(text if text.strip() else "")


_READERS = {".json": _json, ".jsonl": _jsonl, ".csv": _csv, ".txt": _txt}


def numbered(rows: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """Return rows with their numbers; an error of the source itself is told with the number.

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
            raise DataError(
                f"The data failed at row {number}: {type(error).__name__}: {error}"
            ) from error
        yield number, row
        number += 1
