"""The benchmark of checkpoints: what it measures, not how fast it is."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from permllm.cli import call
from permllm.errors import ConfigError, DataError
from permllm.export import bench
from permllm.export.bench import BACKENDS, Sizes, measure, use_backend, what_is_missing
from permllm.export.verify import expected_patterns
from permllm.export.write import export_run
from permllm.models.families import channel_groups, linear_at
from permllm.settings.config import ExportConfig, NMPattern
from permllm.sparsity.nm import violations
from tests.conftest import tiny_model
from tests.export.pruned import load, logits, make_run, relative, variant_model
from tests.models.test_bad_checkpoints import WEIGHTS

CUDA = torch.device("cuda")
FEW = Sizes(batch_sizes=[1, 2], prompt=8, new_tokens=2, seconds=1e-3)


def test_the_command_measures_on_a_cpu(exports: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, dense = exports / "gathered", exports / "of-gathered" / "dense"
    words = [str(out), "--against", str(dense), "--device", "cpu"]
    words += ["--prompt", "8", "--new-tokens", "2", "--batch-sizes", "1", "2", "--seconds", "1e-3"]
    assert call("bench", [*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    names = [variant["variant"] for variant in report["variants"]]
    assert names == ["dense", "as stored", "as stored, gathers left out"]
    for variant in report["variants"]:
        assert [row["batch"] for row in variant["speed"]] == [1, 2]
        assert all(row["prefill_tokens_a_second"] > 0 for row in variant["speed"])
        assert all(row["decode_tokens_a_second"] > 0 for row in variant["speed"])
    assert report["bytes"] == (out / WEIGHTS).stat().st_size
    assert (report["gathers"], len(report["missing"])) == (6, 1)
    assert call("bench", words) == 0
    assert "missing: 2:4 products need an NVIDIA GPU" in capsys.readouterr().out
    assert call("bench", [*words, "--prompt", "0"]) == 1
    assert "prompt=0: must be at least 1" in capsys.readouterr().err


def test_what_is_missing_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert what_is_missing(torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr(bench, "sparse_tensor_cores", lambda device: True)
    assert what_is_missing(CUDA, torch.bfloat16) is None
    assert "--dtype bfloat16" in str(what_is_missing(CUDA, torch.float32))
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="2:4"):
        use_backend(model, "CUTLASS", expected_patterns(model, None, NMPattern(4, 8)), 8)


def test_each_library_is_tried_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for the kernels: one library that multiplies, and one that is not there.

    Keys and values have too few rows for either.
    """
    wide = variant_model("llama", hidden_size=64, num_key_value_heads=1)
    run = make_run(tmp_path, wide, "foldable")
    export_run(run, ExportConfig("folded", "bfloat16"), tmp_path / "out")
    searched: list[tuple[int, ...]] = []

    class Compressed(torch.Tensor):
        packed = None

        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            with torch._C.DisableTorchFunctionSubclass():
                found = func(*args, **(kwargs or {}))
            return found.as_subclass(cls) if func is torch.Tensor.detach else found

    def compressed(weight: torch.Tensor) -> torch.Tensor:
        if torch.sparse.SparseSemiStructuredTensor._FORCE_CUTLASS:
            raise RuntimeError("CUTLASS is not compiled\nfor this")
        return weight.as_subclass(Compressed)

    def search(packed: Any, x: torch.Tensor) -> int:
        searched.append(tuple(x.shape))
        return 7

    monkeypatch.setattr(torch.sparse.SparseSemiStructuredTensor, "_FORCE_CUTLASS", False)
    monkeypatch.setattr(bench, "sparse_tensor_cores", lambda device: True)
    monkeypatch.setattr(bench, "to_sparse_semi_structured", compressed)
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", search)
    report = measure(tmp_path / "out", None, FEW, "cpu")
    used = [variant["used"] for variant in report["variants"]]
    assert used == [None, "10 linears by cuSPARSELt, algorithms [7]"]
    assert report["missing"] == ["2:4 by CUTLASS: CUTLASS is not compiled"]
    assert set(searched) == {(64, 16)}  # once for each shape of a weight
    model = variant_model("llama")
    with pytest.raises(ConfigError, match=r"layers\.0"):
        use_backend(model, "CUTLASS", expected_patterns(model, None), 8)


def test_windows_of_6_8_compute_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In float64, with a stand-in for the kernel."""
    shape = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    run = make_run(tmp_path, variant_model("llama", **shape), "foldable", NMPattern(6, 8))
    export_run(run, ExportConfig("folded"), tmp_path / "out")
    model = load(tmp_path / "out", dtype=torch.float64)
    before, weights = logits(model), []
    monkeypatch.setattr(torch.sparse.SparseSemiStructuredTensor, "_FORCE_CUTLASS", False)
    monkeypatch.setattr(bench, "to_sparse_semi_structured", lambda x: weights.append(x) or x)
    used = use_backend(model, "CUTLASS", expected_patterns(model, None, NMPattern(6, 8)), 8)
    assert used.startswith("14 linears")
    assert {violations(weight, None, NMPattern(2, 4)) for weight in weights} == {0}
    assert relative(logits(model), before) < 1e-6  # transformers' norms are in float32


def test_a_prompt_longer_than_a_sliding_window_is_measured(tmp_path: Path) -> None:
    tiny_model("gemma3_text").save_pretrained(tmp_path)
    (variant,) = measure(tmp_path, None, FEW, "cpu")["variants"]
    assert variant["speed"][0]["decode_tokens_a_second"] > 0


def test_a_prompt_longer_than_the_positions_of_a_model_is_refused(tmp_path: Path) -> None:
    tiny_model("opt", max_position_embeddings=FEW.prompt).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="positions"):
        measure(tmp_path, None, FEW, "cpu")


def test_copies_of_the_cache_are_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    lengths: list[int] = []

    class Slow(DynamicCache):
        def __deepcopy__(self, memo: dict[int, Any]) -> DynamicCache:
            time.sleep(1.0)
            lengths.append(self.get_seq_length())
            cache = DynamicCache()
            cache.layers = copy.deepcopy(self.layers, memo)
            return cache

    monkeypatch.setattr(bench, "DynamicCache", Slow)
    sizes = Sizes(batch_sizes=[1], prompt=8, new_tokens=2, seconds=1e-3)
    (variant,) = measure(tmp_path, None, sizes, "cpu")["variants"]
    assert set(lengths) == {8}  # each measurement begins after the prompt
    assert variant["speed"][0]["decode_tokens_a_second"] > 2 / 1.0


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or not bench.sparse_tensor_cores(CUDA),
    reason="needs sparse tensor cores",
)
@pytest.mark.parametrize("pattern", [NMPattern(2, 4), NMPattern(6, 8)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sparse_tensor_cores_compute_the_same(
    backend: str, pattern: NMPattern, tmp_path: Path
) -> None:
    shape = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    run = make_run(tmp_path, variant_model("llama", **shape), "foldable", pattern)
    export_run(run, ExportConfig("folded", dtype="float16"), tmp_path / "out")
    model = load(tmp_path / "out").to(CUDA)
    x = torch.randn(64, 128, device=CUDA, dtype=torch.float16)
    linear: nn.Linear = linear_at(model, channel_groups(model)[0].members[0])
    before = linear(x)
    used = use_backend(model, backend, expected_patterns(model, None, pattern), 64)
    assert used.startswith(f"14 linears by {backend}")
    torch.testing.assert_close(linear(x), before, rtol=1e-2, atol=1e-2)
