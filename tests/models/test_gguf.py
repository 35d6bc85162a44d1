"""GGUF files as models: converted once for each content, with the dtypes that they hold."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from permllm.errors import DataError
from permllm.models import gguf
from permllm.models.load import dense_folder, load_model
from tests.models.test_bad_checkpoints import local
from tests.models.test_offload import saved


def write(file: Path, scale: float = 1.0, architecture: str = "llama") -> Path:
    """Write a GGUF file with two tensors, one of them in 8 bits."""
    writer = GGUFWriter(file, architecture)
    weights = scale * np.ones((2, 64), np.float32)
    writer.add_tensor("norm", weights[0])
    in_8_bits = quantize(weights, GGMLQuantizationType.Q8_0)
    writer.add_tensor("weight", in_8_bits, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_file_is_converted_once_and_a_run_says_what_it_holds(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = saved("llama", tmp_path / "checkpoint")
    calls = []

    def convert(file: Path, target: Path) -> None:
        calls.append(file.read_bytes())
        shutil.copytree(checkpoint, target, dirs_exist_ok=True)

    monkeypatch.setattr(gguf, "convert_gguf", convert)
    first = write(tmp_path / "first.gguf")
    copied = Path(shutil.copy(first, tmp_path / "copied.gguf"))
    other = write(tmp_path / "other.gguf", scale=2.0)
    with caplog.at_level(logging.INFO):
        identities = [load_model(local(file), 0).identity for file in (first, copied, other)]
    assert identities[0] == identities[1] != identities[2]
    assert calls == [first.read_bytes(), other.read_bytes()]
    assert "0.0M in Q8_0, 0.0M in F32" in caplog.text
    assert dense_folder(local(first)) == dense_folder(local(copied))


def test_a_file_that_transformers_cannot_convert_is_named(cache: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "odd.gguf", architecture="unknown")
    with pytest.raises(DataError, match=r"odd\.gguf"):
        load_model(local(file), 0)
    assert not list((cache / "models").glob("gguf-*"))
