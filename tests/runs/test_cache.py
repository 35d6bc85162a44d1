"""What jobs share is computed once, kept exactly, and computed again when anything that it follows from changes."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import ByT5Tokenizer

import permllm
from permllm.config import CalibrationConfig, PerplexityConfig
from permllm.data.registry import perplexity_texts
from permllm.data.text_file import TextFile
from permllm.data.texts.builtin import TEXT as BUILTIN
from permllm.data.windows import all_tokens, calibration_tokens, tokenizer_digest
from permllm.errors import ConfigError, DataError
from permllm.models.families import channel_groups
from permllm.models.load import LoadedModel
from permllm.pruning.ria import RIA
from permllm.pruning.sparsegpt import SparseGPT
from permllm.pruning.wanda import Wanda
from permllm.runs import code
from permllm.runs.cache import cached_tensors, cached_values
from permllm.runs.schema import Object
from permllm.sparsity.calibrate import NormOver
from permllm.sparsity.calibration_cache import packed_factors, shared_calibration, unpacked_factors
from tests.conftest import tiny_model

CODE = ("permllm.sparsity.nm",)
TOKENIZER = ByT5Tokenizer(extra_ids=0)
TOKENS = torch.randint(0, 256, (6, 16), generator=torch.Generator().manual_seed(0))

WORK = """
import sys, time
from pathlib import Path
from permllm.runs.cache import cached_values
from permllm.runs.schema import Object

def compute():
    with open(sys.argv[1], "a") as stream:
        stream.write("x")
    time.sleep(1)
    return {"value": 1.5}

assert cached_values("kind", {"a": 1}, ("permllm.sparsity.nm",), Object, compute) == {"value": 1.5}
"""


def refuse() -> dict[str, torch.Tensor]:
    raise AssertionError("computed again")


def test_processes_at_the_same_time_compute_once(cache: Path, tmp_path: Path) -> None:
    running = [subprocess.Popen([sys.executable, "-c", WORK, str(tmp_path / "count")]) for _ in range(3)]
    assert [process.wait(timeout=120) for process in running] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "x"


def test_values_and_tensors_come_back_as_they_were_and_anything_else_is_computed(cache: Path) -> None:
    tensors = {"a": torch.randn(3, dtype=torch.float64), "b": torch.tensor([1, 2]), "c": torch.randn(2, 2).bfloat16()}
    assert cached_tensors("kind", {"a": 1}, CODE, lambda: tensors) is tensors
    found = cached_tensors("kind", {"a": 1}, CODE, refuse)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in tensors)
    with pytest.raises(AssertionError):
        cached_tensors("kind", {"a": 2}, CODE, refuse)
    for file in (cache / "kind").glob("*.safetensors"):
        file.write_bytes(b"broken")
    assert cached_tensors("kind", {"a": 1}, CODE, lambda: {"a": torch.ones(1)}) == {"a": torch.ones(1)}
    assert cached_values("kind", {"a": 1}, CODE, Object, lambda: {"x": [1, None]}) == {"x": [1, None]}
    assert cached_values("kind", {"a": 1}, CODE, Object, lambda: {"x": 0}) == {"x": [1, None]}


def test_a_full_disk_costs_no_result(cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def full(*_: object) -> None:
        raise DataError("no space left to write it")

    monkeypatch.setattr("permllm.runs.cache.write_record", full)
    assert cached_values("kind", {"a": 1}, CODE, Object, lambda: {"x": 1}) == {"x": 1}
    assert "no space left" in caplog.text


def test_the_dense_pass_is_shared_by_jobs_and_its_target_by_pruners(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    loaded, groups = LoadedModel(model, TOKENIZER, "tiny"), channel_groups(model)

    def share(pruner: object, name: str, tokens: torch.Tensor = TOKENS, norm_over: NormOver = "tokens") -> object:
        settings = {"name": name}
        return shared_calibration(loaded, groups, tokens, pruner, settings, 2, torch.float32, norm_over)  # type: ignore[arg-type]

    first = share(Wanda(), "wanda")
    share(RIA(), "ria")
    assert len(list((cache / "target").glob("*.safetensors"))) == 1
    assert len(list((cache / "saliency").glob("*.safetensors"))) == 2
    monkeypatch.setattr("permllm.sparsity.calibration_cache.calibrate_dense", lambda *_: refuse())
    again = share(Wanda(), "wanda")
    assert torch.equal(again.target, first.target)  # type: ignore[attr-defined]
    for path, factors in first.factors.items():  # type: ignore[attr-defined]
        found = again.factors[path]  # type: ignore[attr-defined]
        assert (found.power, found.row is None) == (factors.power, factors.row is None)
        assert torch.equal(found.column, factors.column)
    for changed in (
        lambda: share(SparseGPT(), "sparsegpt"),
        lambda: share(Wanda(), "wanda", TOKENS.flip(0)),
        lambda: share(Wanda(), "wanda", norm_over="samples"),
    ):
        with pytest.raises(AssertionError, match="computed again"):
            changed()


def test_the_saliency_of_a_pruner_from_outside_follows_its_helpers(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "my_pruner.py").write_text(
        "from dataclasses import dataclass\nfrom my_helper import scaled\nfrom permllm.pruning.wanda import Wanda\n"
        "@dataclass(frozen=True)\nclass Mine(Wanda):\n"
        "    def factors(self, weight, statistics):\n        return scaled(super().factors(weight, statistics))\n"
    )
    loaded = LoadedModel(tiny_model("llama"), TOKENIZER, "tiny")
    groups = channel_groups(loaded.model)
    sums = []
    for scale in (1, 2):
        (tmp_path / "my_helper.py").write_text(
            "from dataclasses import replace\ndef scaled(factors):\n"
            f"    return replace(factors, column={scale} * factors.column)\n"
        )
        # As in a new process.
        for name in ("my_pruner", "my_helper"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        pruner = importlib.import_module("my_pruner").Mine()
        found = shared_calibration(loaded, groups, TOKENS, pruner, {"_target_": "my_pruner.Mine"}, 2, torch.float32)
        sums.append(sum(float(factors.column.sum()) for factors in found.factors.values()))
    assert sums[1] == pytest.approx(2 * sums[0])
    assert not (cache / "saliency").exists()
    assert len(list((cache / "target").glob("*.safetensors"))) == 1


def test_factors_are_kept_exactly() -> None:
    model = tiny_model("llama")
    loaded = LoadedModel(model, TOKENIZER, "other")
    factors = shared_calibration(loaded, channel_groups(model), TOKENS, RIA(), {"name": "ria"}, 2, torch.float32).factors
    found = unpacked_factors(packed_factors(factors))
    assert found.keys() == factors.keys()
    for path, values in factors.items():
        row, expected = found[path].row, values.row
        assert row is not None
        assert expected is not None
        assert torch.equal(row, expected)
        assert torch.equal(found[path].column, values.column)
        assert found[path].power == values.power


def test_tokens_are_kept_until_text_tokenizer_or_sizes_change(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "text.txt"
    file.write_text("some words of text, " * 50)
    settings = CalibrationConfig(dataset="text", data_files=str(file), samples=3, seqlen=20)
    tokens = calibration_tokens(TOKENIZER, settings, seed=0)
    (named,) = perplexity_texts(PerplexityConfig(None, seqlen=20, data_files=str(file)))
    whole = all_tokens(TOKENIZER, named)
    assert (named.name, len(whole)) == ("text", len(TOKENIZER(file.read_text())["input_ids"]))

    def unread(*_: object) -> list[str]:
        raise AssertionError("read again")

    monkeypatch.setattr("permllm.data.text_file.read_text_file", unread)
    assert torch.equal(calibration_tokens(TOKENIZER, settings, seed=0), tokens)
    assert torch.equal(all_tokens(TOKENIZER, named), whole)
    with pytest.raises(AssertionError, match="read again"):
        calibration_tokens(TOKENIZER, settings, seed=1)
    with pytest.raises(AssertionError, match="read again"):
        calibration_tokens(ByT5Tokenizer(extra_ids=1), settings, seed=0)
    file.write_text("other words of text, " * 50)
    with pytest.raises(AssertionError, match="read again"):
        calibration_tokens(TOKENIZER, settings, seed=0)


def test_digests_tell_texts_and_tokenizers_apart(tmp_path: Path) -> None:
    assert tokenizer_digest(TOKENIZER) == tokenizer_digest(ByT5Tokenizer(extra_ids=0))
    assert tokenizer_digest(TOKENIZER) != tokenizer_digest(ByT5Tokenizer(extra_ids=3))
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.json").write_text("a")
    digests = {TextFile(str(tmp_path / name)).digest(calibration=True) for name in ("a.txt", "a.json")}
    assert len({*digests, BUILTIN.digest(calibration=True)}) == 3
    with pytest.raises(DataError, match=r"nowhere\.txt does not exist"):
        TextFile(str(tmp_path / "nowhere.txt")).digest(calibration=True)


def test_a_key_follows_from_the_code_that_computes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "permllm"
    shutil.copytree(Path(permllm.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(code, "_PACKAGE", package)
    modules = {
        "tokens of c4": ("permllm.data.windows", "permllm.data.texts.c4"),
        "tokens of boolq": ("permllm.data.windows", "permllm.data.texts.boolq_passages"),
        "perplexity": ("permllm.evaluation.perplexity", "permllm.models.load"),
        "target": ("permllm.sparsity.calibrate", "permllm.models.load"),
        "saliency of ria": ("permllm.sparsity.calibrate", "permllm.pruning.ria"),
        "saliency of sparsegpt": ("permllm.sparsity.calibrate", "permllm.pruning.sparsegpt"),
    }

    def digests() -> dict[str, str]:
        code.code_digest.cache_clear()
        return {name: code.code_digest(*found) for name, found in modules.items()}

    before = digests()
    for file, changed in {
        "pruning/ria.py": {"saliency of ria"},
        "sparsity/statistics.py": {"target", "saliency of ria", "saliency of sparsegpt"},
        "sparsity/norm.py": {"saliency of ria"},
        "evaluation/perplexity.py": {"perplexity"},
        "data/text_file.py": {"tokens of c4", "tokens of boolq", "perplexity"},
        "data/texts/base.py": {"tokens of c4", "tokens of boolq", "perplexity"},
        "data/texts/c4.py": {"tokens of c4"},  # of other tokens, perplexity has another key
        # Loading runs a small model of a type without a table, and so through the layers.
        "runtime/precision.py": {"perplexity", "target", "saliency of ria", "saliency of sparsegpt"},
        "models/families.py": {"perplexity", "target", "saliency of ria", "saliency of sparsegpt"},
        "permutation/foldable.py": set(),
        "runs/directory.py": set(),
    }.items():
        text = (package / file).read_text()
        (package / file).write_text(text + "# changed\n")
        found = digests()
        assert {name for name in modules if found[name] != before[name]} == changed, file
        (package / file).write_text(text)
    code.code_digest.cache_clear()


def test_what_was_longest_not_used_goes_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def keep(number: int) -> bool:
        """Whether it had to be computed."""
        calls = []
        cached_tensors("kind", {"a": number}, CODE, lambda: calls.append(1) or {"x": torch.zeros(25_000)})
        return bool(calls)

    for number in range(3):
        assert keep(number)
        for file in (cache / "kind").glob("*.safetensors"):
            os.utime(file, (file.stat().st_mtime - 100,) * 2)
    assert not keep(0)  # the oldest, and now the latest that was used
    monkeypatch.setenv("PERMLLM_CACHE_GB", "0.00035")  # three of 100 kB
    assert keep(3)
    assert [keep(number) for number in (0, 2, 3)] == [False, False, False]
    assert keep(1)
    monkeypatch.setenv("PERMLLM_CACHE_GB", "many")
    with pytest.raises(ConfigError, match="PERMLLM_CACHE_GB=many"):
        keep(9)
