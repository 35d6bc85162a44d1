"""The cache: results are computed once, kept exactly, and computed again when their key changes."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import ByT5Tokenizer

from permllm.errors import DataError
from permllm.models.load import LoadedModel
from permllm.pruning.methods import Job, checked_groups, methods_of
from permllm.pruning.phases import DenseCalibration, calibrate
from permllm.store.cache import cached
from permllm.store.directory import Record
from permllm.store.loggers import NO_LOGGER
from tests.conftest import tiny_model
from tests.settings.test_config import config

TOKENIZER = ByT5Tokenizer(extra_ids=0)
TOKENS = torch.randint(0, 256, (6, 16), generator=torch.Generator().manual_seed(0))


def refuse() -> dict[str, torch.Tensor]:
    raise AssertionError("computed again")


def compute_once(file: Path) -> None:
    def compute() -> dict[str, float]:
        with file.open("a") as stream:
            stream.write("x")
        time.sleep(0.5)
        return {"value": 1.5}

    assert cached("kind", {"a": 1}, compute) == {"value": 1.5}


def test_processes_at_the_same_time_compute_once(cache: Path, tmp_path: Path) -> None:
    start = multiprocessing.get_context("fork").Process
    processes = [start(target=compute_once, args=[tmp_path / "count"]) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "x"


def test_values_and_tensors_come_back_as_they_were(cache: Path) -> None:
    tensors = {"a": torch.randn(3, dtype=torch.float64), "b": torch.tensor([1, 2])}
    tensors["c"] = torch.randn(2, 2).bfloat16()
    cached("kind", {"a": 1}, lambda: tensors)
    found = cached("kind", {"a": 1}, refuse)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)  # dtype too
    cached("kind", {"a": 2}, lambda: {"x": [1, None]})
    assert cached("kind", {"a": 2}, refuse) == {"x": [1, None]}
    for kind, key in (("kind", {"a": 3}), ("other", {"a": 1})):
        with pytest.raises(AssertionError):
            cached(kind, key, refuse)


def test_an_unreadable_result_is_computed_again(cache: Path) -> None:
    cached("kind", {"a": 1}, lambda: {"x": torch.zeros(1)})
    (file,) = (cache / "results").glob("*.pt")
    file.write_bytes(b"broken")
    for compute in (lambda: {"x": torch.ones(1)}, refuse):
        assert cached("kind", {"a": 1}, compute) == {"x": torch.ones(1)}


def test_what_was_not_read_for_longest_leaves_a_cache_over_its_limit(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        cached("kind", {"a": number}, lambda: {"x": torch.zeros(100_000)})  # 0.4 MB
        time.sleep(0.02)  # of the file system's clock
    cached("kind", {"a": 0}, refuse)
    monkeypatch.setenv("PERMLLM_CACHE_GB", "0.0013")
    cached("kind", {"a": 3}, lambda: {"x": torch.zeros(100_000)})
    for number in (0, 2, 3):
        cached("kind", {"a": number}, refuse)
    with pytest.raises(AssertionError):
        cached("kind", {"a": 1}, refuse)


def test_changed_code_neither_reads_nor_keeps_results(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached("kind", {"a": 1}, lambda: {"x": 1})
    changed = {"commit": "of a test", "dirty": True}
    with monkeypatch.context() as patch:
        patch.setattr("permllm.store.cache.git_commit", lambda: changed)
        assert cached("kind", {"a": 1}, lambda: {"x": 2}) == {"x": 2}
        assert cached("kind", {"a": 2}, lambda: {"x": 3}) == {"x": 3}
    assert cached("kind", {"a": 1}, refuse) == {"x": 1}
    assert len([*(cache / "results").glob("kind-*.pt")]) == 1


def test_a_full_disk_costs_no_result(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise DataError("no space left to write it")

    monkeypatch.setattr("permllm.store.cache.save_state", full)
    assert cached("kind", {"a": 2}, lambda: {"x": 1}) == {"x": 1}


def test_a_run_records_whether_the_cache_had_its_results_when_it_began(cache: Path) -> None:
    loaded = LoadedModel(tiny_model("llama"), TOKENIZER, "tiny")

    def recorded(pruner: str, record: Record) -> dict[str, bool]:
        settings = config(
            "model=tiny-random", f"pruner={pruner}", f"calibration.samples={len(TOKENS)}"
        )
        methods = methods_of(settings)
        groups = checked_groups(settings, methods, loaded.model)
        job = Job(settings, methods, record, NO_LOGGER, loaded, groups, torch.float32, TOKENS)
        calibrate(job)
        facts: dict[str, bool] = record.metrics["cached"]
        return facts

    first = Record()
    assert recorded("wanda", first) == {"saliency": False, "target": False}
    # The cache has what the run itself has computed before it was interrupted.
    assert recorded("wanda", first) == {"saliency": False, "target": False}
    assert recorded("wanda", Record()) == {"saliency": True, "target": True}
    assert recorded("ria", Record()) == {"saliency": False, "target": True}


def test_the_dense_pass_is_shared_by_jobs_and_its_target_by_pruners(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = LoadedModel(tiny_model("llama"), TOKENIZER, "tiny")

    def share(pruner: str, tokens: Tensor = TOKENS, *words: str) -> DenseCalibration:
        samples = f"calibration.samples={len(tokens)}"
        settings = config("model=tiny-random", f"pruner={pruner}", samples, *words)
        methods = methods_of(settings)
        groups = checked_groups(settings, methods, loaded.model)
        job = Job(settings, methods, Record(), NO_LOGGER, loaded, groups, torch.float32, tokens)
        return calibrate(job)

    first = {pruner: share(pruner) for pruner in ("wanda", "ria")}
    assert len(list((cache / "results").glob("target-*.pt"))) == 1
    assert len(list((cache / "results").glob("saliency-*.pt"))) == 2
    monkeypatch.setattr("permllm.pruning.phases.calibrate_dense", lambda *_, **__: refuse())
    for pruner, before in first.items():
        again = share(pruner)
        assert torch.equal(again.target, before.target)
        assert again.factors.keys() == before.factors.keys()
        for path, factors in before.factors.items():
            found = again.factors[path]
            assert found.power == factors.power
            assert torch.equal(found.column, factors.column)
            assert found.row is factors.row is None or torch.equal(found.row, factors.row)
    for changed in (
        ("sparsegpt",),
        ("wanda", TOKENS.flip(0)),
        ("wanda", TOKENS, "permutation=lcp-paper"),
    ):
        with pytest.raises(AssertionError, match="computed again"):
            share(*changed)
