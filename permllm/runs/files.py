"""Files that are written so that a reader sees the old content or the new, never a part, and read by a declared form.

What another process has written may be anything. `read_json` and `read_yaml` take it apart by a schema of
`permllm.runs.schema`, and files of ours carry a checksum of their content beside it.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import secrets
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from permllm.errors import DataError, first_line
from permllm.runs.names import CHECKSUM
from permllm.runs.schema import FileList, Object, Schema, validated

log = logging.getLogger(__name__)

# The list of a folder's files, among them.
_LIST = "checksums.json"
# Bits of a whole number.
_LONGEST_NUMBER = 64
# Bytes that are read at a time.
_PART = 1 << 20
# What `write_atomically` writes to before it moves it, and what a process that was killed leaves.
_SCRATCH = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}")


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a scratch path in the same folder, then move it to `path`. What is no file is written to as it is.

    Who may read the file follows from the process's umask.

    Raises:
        DataError: there is no space, or the folder cannot be written; nothing half-written is left.
    """
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    made = False
    try:
        if path.exists() and not path.is_file():  # a device, a pipe: it must not be replaced by a file
            write(path)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        made = True
        mode = scratch.stat().st_mode
        write(scratch)
        scratch.chmod(mode)  # safetensors makes a file of its own
        os.replace(scratch, path)
        made = False
    except (OSError, RuntimeError) as error:
        number = getattr(error, "errno", None)
        # torch.save says "unexpected pos" when a write falls short.
        if number in (errno.ENOSPC, errno.EDQUOT) or any(text in str(error) for text in ("No space left", "unexpected pos")):
            raise DataError(f"no space left to write {path}") from error
        raise DataError(f"cannot write {path}: {error}") from error
    finally:
        if made:
            scratch.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file."""
    write_atomically(path, lambda scratch: _write(scratch, text))


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write plain values as JSON, keys in their order; without an indent in one line."""
    write_text(path, json.dumps(value, indent=indent, allow_nan=True) + "\n")


def write_record(path: Path, values: Mapping[str, Any], indent: int | None = 2) -> None:
    """Write a JSON object with a checksum of the other keys' values, which `read_json` compares."""
    # As a reader will have it, in whom keys are texts.
    content = json.loads(json.dumps({key: value for key, value in values.items() if key != CHECKSUM}))
    write_json(path, content | {CHECKSUM: _checksum(content)}, indent)


def write_record_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON objects, a line each, each with a checksum of its own, for `read_record_lines`."""
    contents = (json.loads(json.dumps(dict(record))) for record in records)
    write_text(path, "".join(json.dumps(content | {CHECKSUM: _checksum(content)}) + "\n" for content in contents))


def read_record_lines(path: Path, schema: type[Schema]) -> Iterator[tuple[str, Schema | DataError]]:
    """Each line of such a file: where it stands, in words, and what it holds, or why it cannot be read.

    Raises:
        DataError: the file cannot be read.
    """
    for number, line in enumerate(_content(path).splitlines(), start=1):
        where = f"{path}, line {number}"
        try:
            yield where, _checked(where, line, schema, always=True)
        except DataError as error:
            yield where, error


def read_json(path: Path, schema: Any = Object) -> Any:
    """What a JSON file holds.

    Args:
        path: of the file.
        schema: what it must hold; where it is an object with a checksum, that is compared first and left out of the result.

    Raises:
        DataError: it cannot be read, is no JSON, was changed after it was written, or a field is not as the schema says.
    """
    return _checked(str(path), _content(path), schema)


def _checked(where: str, content: bytes, schema: type[Schema], always: bool = False) -> Schema:
    """The value, where it is as the schema says and as its checksum says, which `always` asks for."""
    try:
        value = _parsed(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not readable JSON: {first_line(error)}") from error
    if isinstance(value, dict) and CHECKSUM in value:
        stated = value.pop(CHECKSUM)
        if stated != _checksum(value):
            raise DataError(f"{where} is corrupt: its content is not what was written")
    elif always:
        raise DataError(f"{where} is corrupt: it has no checksum")
    return validated(where, value, schema)


def read_json_lines(path: Path, schema: type[Schema]) -> list[Schema]:
    """The lines of a file that are JSON as the schema says; others are left out, such as a last one that was cut short.

    Raises:
        DataError: the file cannot be read.
    """
    found = []
    for line in _content(path).splitlines():
        try:
            found.append(validated(str(path), _parsed(line), schema))
        except (ValueError, RecursionError, DataError):
            continue
    return found


def read_yaml(path: Path, schema: Any = Object) -> Any:
    """What a YAML file holds, like `read_json`: an object of what JSON has too, each part written out. It has no checksum."""
    content = _content(path)
    try:
        value = yaml.load(content.decode(), _WrittenOut)
        _check_encodable(value)
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"{path} is not readable YAML: {first_line(error)}") from error
    # YAML has dates, sets and keys that are no texts as well, which no schema of ours has.
    validated(str(path), value, Object)
    return validated(str(path), value, schema)


def file_checksum(path: Path) -> str:
    """crc32 of a file's bytes. Raises DataError where it cannot be read."""
    found = 0
    try:
        with open(path, "rb") as stream:
            while part := stream.read(_PART):
                found = zlib.crc32(part, found)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return f"{found:08x}"


def write_list(folder: Path) -> None:
    """Write a list of the files in a folder, with their checksums, for `as_listed`."""
    files = {file.name: file_checksum(file) for file in sorted(folder.iterdir())}
    write_record(folder / _LIST, {"files": files})


def as_listed(folder: Path) -> bool:
    """Return whether a folder holds the files that `write_list` found, as they were."""
    try:
        stated = read_json(folder / _LIST, FileList)["files"]
        names = {file.name for file in folder.iterdir()} - {_LIST}
        return names == stated.keys() and all(file_checksum(folder / name) == stated[name] for name in names)
    except DataError:
        return False


def _content(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise DataError(f"{path} cannot be read: it is no file")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # the latter of a name that no file can have
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


class _WrittenOut(yaml.SafeLoader):
    """Refuses references to other parts of the file, with which a few lines become any amount of memory."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"it refers to another part of itself: *{self.peek_event().anchor}")
        return super().compose_node(parent, index)


def _parsed(text: bytes) -> Any:
    value = json.loads(text.decode(), parse_int=_whole)
    _check_encodable(value)
    return value


def _whole(digits: str) -> int:
    number = int(digits)
    if number.bit_length() > _LONGEST_NUMBER:  # no float either
        raise ValueError(f"it holds a whole number of {len(digits)} digits")
    return number


def _check_encodable(value: Any) -> None:
    """Raise ValueError where a text holds half of a character, which an escape can make and nothing can print."""
    json.dumps(value, ensure_ascii=False, default=str, skipkeys=True).encode()


def _checksum(content: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def scratch_of(path: Path) -> str | None:
    """The name of the file that something is the scratch of (`write_atomically`), whoever wrote it; None for anything else."""
    match = _SCRATCH.fullmatch(path.name)
    return match["name"] if match else None


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
