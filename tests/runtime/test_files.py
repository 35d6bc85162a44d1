"""Digests of input files: read again only where a file has changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from permllm.runtime import files
from permllm.runtime.files import file_sha256, input_sha256


def test_a_large_file_is_read_again_only_after_a_change(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LARGE_FILE", 4)
    read = []

    def reading(file: Path) -> str:
        read.append(file.name)
        return file_sha256(file)

    monkeypatch.setattr(files, "file_sha256", reading)
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_text("abc")
    large.write_text("abcd")
    for _ in range(2):
        assert input_sha256(small) == file_sha256(small)
        assert input_sha256(large) == file_sha256(large)
    assert read == ["small", "large", "small"]
    now = large.stat()
    large.write_text("wxyz")
    os.utime(large, ns=(now.st_atime_ns, now.st_mtime_ns))  # the times of changes stay different
    assert input_sha256(large) == file_sha256(large)
    assert read[3:] == ["large"]
