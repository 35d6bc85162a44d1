"""GGUF files as models: converted once for each content."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from permllm.errors import DataError
from permllm.models import gguf
from permllm.models.load import dense_folder, load_model, meta_model
from tests.conftest import tiny_model
from tests.models.test_bad_checkpoints import local
from tests.models.test_offload import saved


def written(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write(
    file: Path,
    scale: float = 1.0,
    architecture: str = "llama",
    name: str = "norm",
    scaling: float | None = None,
) -> Path:
    """Write a GGUF file with two tensors, one of them in 8 bits."""
    writer = GGUFWriter(file, architecture)
    if scaling:
        writer.add_rope_scaling_factor(scaling)
    weights = scale * np.ones((2, 64), np.float32)
    writer.add_tensor(name, weights[0])
    in_8_bits = quantize(weights, GGMLQuantizationType.Q8_0)
    writer.add_tensor("weight", in_8_bits, raw_dtype=GGMLQuantizationType.Q8_0)
    written(writer)
    return file


def test_a_file_is_converted_once(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    identities = [load_model(local(file), 0).identity for file in (first, copied, other)]
    assert identities[0] == identities[1] != identities[2]
    assert calls == [first.read_bytes(), other.read_bytes()]
    assert dense_folder(local(first)) == dense_folder(local(copied))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"architecture": "unknown"}, "unknown"),
        ({"name": "rope_freqs.weight"}, "rope_freqs.weight"),
        ({"name": "rope_factors_long.weight"}, "rope_factors_long.weight"),
        ({"scaling": 8.0}, "llama.rope.scaling.factor"),
    ],
)
def test_a_file_that_would_become_another_model_is_refused(
    settings: dict[str, Any], named: str, cache: Path, tmp_path: Path
) -> None:
    file = write(tmp_path / "odd.gguf", **settings)
    with pytest.raises(DataError, match=rf"odd\.gguf.*{named}"):
        load_model(local(file), 0)
    assert not list((cache / "models").glob("gguf-*"))


def test_a_file_with_tensors_that_the_model_does_not_get_is_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(gguf.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: model)
    file = write(tmp_path / "biased.gguf")
    with pytest.raises(DataError, match=rf"biased\.gguf.*192.*{model.num_parameters()}"):
        load_model(local(file), 0)


def test_the_architecture_is_read_without_a_conversion(cache: Path, tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_block_count(3)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_vocab_size(40)
    writer.add_tensor("output.weight", np.ones((40, 64), np.float32))
    written(writer)
    model = meta_model(local(tmp_path / "model.gguf"))
    assert len(model.model.layers) == 3
    assert model.model.layers[0].mlp.gate_proj.weight.shape == (96, 64)
    assert not list((cache / "models").glob("gguf-*"))
