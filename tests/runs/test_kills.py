"""`kill -9` before anything that a job moves or removes loses nothing but time.

What a kill leaves is the folder as it is at that place: one run makes a copy at each, and the same job continues each copy.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from permllm import job
from permllm.config import read_config
from permllm.runs.files import read_json, read_lines
from tests.test_config import composed

WORDS = (
    *("model=tiny", "logger=none", "pruner=sparsegpt", "permutation=lcp", "permutation.epochs=2", "permutation.batch_size=2"),
    *("permutation.compile=false", "calibration.samples=2", "calibration.seqlen=16", "calibration.batch_size=4"),
    *("evaluation.perplexity.limit=1", "export=gathered"),
)


def run(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Run the job in a folder of its own, its cache too."""
    patch.setenv("PERMLLM_CACHE", str(folder / "cache"))
    job.run(read_config(composed(*WORDS, f"run_dir={folder}/run")))


def outcome(folder: Path) -> dict[str, Any]:
    """Return all that must not depend on where a job was killed: numbers, files, and that nothing else is left."""
    metrics = read_json(folder / "run" / "metrics.json")
    found = {key: metrics[key] for key in ("status", "perplexity", "sparsity", "retained_saliency", "output_error")}
    found["export"] = metrics["export"] | {"seconds": None}
    found["history"] = [
        line | {"step_seconds": 0, "peak_memory_bytes": 0} for line in read_lines(folder / "run" / "history.jsonl")
    ]
    files = {file.relative_to(folder): file for file in (folder / "run").rglob("*")}
    found["tensors"] = {
        name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items() if file.suffix == ".safetensors"
    }
    return found | {"files": sorted(files), "cache": sorted(file.name for file in (folder / "cache").rglob(".*"))}


def test_a_job_that_was_killed_anywhere_ends_with_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[Path] = []

    def copy_before(owner: Any, name: str, patch: pytest.MonkeyPatch) -> None:
        original = getattr(owner, name)

        def copying(*arguments: Any, **named: Any) -> Any:
            places.append(tmp_path / str(len(places)))
            shutil.copytree(tmp_path / "whole", places[-1])
            return original(*arguments, **named)

        patch.setattr(owner, name, copying)

    (tmp_path / "whole").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((os, "replace"), (Path, "rename"), (Path, "unlink"), (shutil, "rmtree")):
            copy_before(owner, name, patch)
        run(tmp_path / "whole", patch)
    assert len(places) > 40
    expected = outcome(tmp_path / "whole")
    for place in places:
        run(place, monkeypatch)
        assert outcome(place) == expected
        shutil.rmtree(place)
