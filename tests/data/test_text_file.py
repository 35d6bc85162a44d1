"""Files of text that cannot be used: one line that names the file and the row."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from permllm.data.text_file import read_text_file
from permllm.errors import DataError

BROKEN_TEXTS: dict[str, tuple[bytes, str]] = {
    "latin.txt": ("é".encode("latin-1"), "cannot be read: 'utf-8' codec can't decode byte 0xe9"),
    "empty.jsonl": (b"", "holds no text"),
    "cut.jsonl": (b'{"text": "a"}\n{"te', "cannot be read: line 2, column 2: Unterminated string"),
    "number.jsonl": (b'{"text": "a"}\n\n{"text": 5}\n', "row 2: its `text` is no string but int"),
    "deep.json": (b"[" * 100_000, "cannot be read: maximum recursion depth"),
    "garbage.parquet": (b"PAR1garbagePAR1", "cannot be read: "),
    "x.pdf": (b"x", "the ending '.pdf' is not known"),
}


@pytest.mark.parametrize("name", sorted(BROKEN_TEXTS))
def test_a_text_that_cannot_be_used_is_one_line(name: str, tmp_path: Path) -> None:
    content, message = BROKEN_TEXTS[name]
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError) as raised:
        read_text_file(str(file))
    assert str(raised.value).startswith(f"text file {file}")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_texts_that_are_no_strings_are_refused_in_parquet_too(tmp_path: Path) -> None:
    for values, message in (
        [[1, 2], "row 1: its `text` is no string but int"],
        [[b"x"], "no string but bytes"],
    ):
        parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet")
        with pytest.raises(DataError, match=message):
            read_text_file(str(tmp_path / "a.parquet"))
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", None, "two"], "n": [1, 2, 3]}), file)
    assert read_text_file(str(file)) == ["one", "two"]
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 0xFF
    file.write_bytes(content[:-20])
    with pytest.raises(DataError, match="cannot be read"):
        read_text_file(str(file))


def test_what_is_no_file_is_not_read_as_a_text(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "device.txt").symlink_to("/dev/zero")
    for name in ("folder.txt", "pipe.txt", "device.txt"):
        with pytest.raises(DataError, match="is no file"):
            read_text_file(str(tmp_path / name))
    with pytest.raises(DataError, match="does not exist"):
        read_text_file("a\0b.txt")
