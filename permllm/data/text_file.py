"""Text files of the user's own."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pyarrow import parquet

from permllm.data.texts.base import COLUMN, Text
from permllm.errors import DataError, first_line


class TextFile(Text):
    """A txt, json lines or parquet file, to calibrate or to measure perplexity on.

    Args:
        path: of the file.

    Raises:
        DataError: its ending is none that can be read.
    """

    calibrates = evaluates = True

    def __init__(self, path: str) -> None:
        _ending(path)  # before a model is loaded
        self._path = path

    def calibration(self, seed: int) -> Sequence[str]:
        """Its documents."""
        return read_text_file(self._path)

    def evaluation(self) -> str:
        """Its documents, joined by a blank line."""
        return "\n\n".join(read_text_file(self._path))

    def digest(self, calibration: bool) -> str:
        """sha256 of the file, and its ending, which says how it is read."""
        try:
            with open(self._path, "rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest() + Path(self._path).suffix
        except OSError as error:
            reason = (
                "does not exist"
                if isinstance(error, FileNotFoundError)
                else f"cannot be read: {error.strerror}"
            )
            raise DataError(f"text file {self._path} {reason}") from error


def _ending(path: str) -> str:
    kind = Path(path).suffix
    if kind not in _READERS:
        raise DataError(
            f"text file {path}: the ending {kind!r} is not known; valid are {', '.join(_READERS)}"
        )
    return kind


def read_text_file(path: str) -> list[str]:
    """Documents of a file: a txt file is one document; json lines and parquet have one a row, in the column `text`.

    Raises:
        DataError: the file is missing, of another kind, unreadable, or has no text, or a row's text
            is no string.
    """
    if not os.path.isfile(path):
        raise DataError(
            f"text file {path} {'is no file' if os.path.exists(path) else 'does not exist'}"
        )
    reader = _READERS[_ending(path)]
    try:
        rows = reader(path)
    except MemoryError:
        raise
    except Exception as error:  # pyarrow's are of many classes
        raise DataError(f"text file {path} cannot be read: {first_line(error)}") from error
    columns: dict[str, None] = {}
    documents = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"text file {path}: row {number} is no object with a `text`")
        columns |= dict.fromkeys(row)
        text = row.get(COLUMN)
        if text is not None:
            if not isinstance(text, str):
                raise DataError(
                    f"text file {path}: row {number}: its `text` is no string but {type(text).__name__}"
                )
            if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
                raise DataError(
                    f"text file {path}: row {number}: its `text` holds half of a character"
                )
            documents.append(text)
    if rows and COLUMN not in columns:
        raise DataError(
            f"text file {path} has no column `text`; its columns are {', '.join(columns)}"
        )
    if not any(documents):
        raise DataError(f"text file {path} holds no text")
    return documents


def _txt_rows(path: str) -> list[Any]:
    return [{COLUMN: _read(path)}]


def _read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8-sig")  # some editors begin a file with a mark


def _json_rows(path: str) -> list[Any]:
    """Of a list or a single object, or an object a line."""
    content = _read(path)
    try:
        value = json.loads(content)
    except ValueError:
        return [
            _json_row(number, line)
            for number, line in enumerate(content.split("\n"), 1)
            if line.strip()
        ]
    return value if isinstance(value, list) else [value]


def _json_row(number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from error


def _parquet_rows(path: str) -> list[Any]:
    columns = parquet.read_schema(path).names
    if COLUMN not in columns:
        return [dict.fromkeys(columns)]
    return list(parquet.read_table(path, columns=[COLUMN]).to_pylist())


_READERS: dict[str, Callable[[str], list[Any]]] = {
    ".txt": _txt_rows,
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".parquet": _parquet_rows,
}
