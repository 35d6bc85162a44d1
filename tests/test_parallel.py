"""Two processes under torchrun learn what one learns with the same global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.conftest import ROOT, run_command

OVERRIDES = (
    "model=tiny",
    "model.dtype=float64",
    "logger=none",
    "calibration.samples=7",  # batches of 4 and 3: unequal shares
    "permutation.passes=6",
    "permutation.learning_rate=0.05",
    "permutation.select_from=6",
    "run_dir=run",
)


def torchrun(cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*command, str(ROOT / "run.py"), *OVERRIDES],
        cwd=cwd,
        env=os.environ | {"PERMLLM_CACHE": str(cwd / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_two_processes_learn_what_one_does_and_one_keeps_the_record(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = run_command(*OVERRIDES, cwd=tmp_path / "one")
    assert one.returncode == 0, one.stderr
    two = torchrun(tmp_path / "two")
    assert two.returncode == 0, two.stderr
    single, double = (load_file(tmp_path / name / "run" / "permutations.safetensors") for name in ("one", "two"))
    assert all(torch.equal(single[name], double[name]) for name in single)
    assert any(not torch.equal(order.sort().values, order) for order in single.values())
    histories = [
        [json.loads(line) for line in (tmp_path / name / "run" / "history.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert len(histories[1]) == 6
    for mine, other in zip(*histories, strict=True):
        assert abs(mine["loss"] - other["loss"]) < 1e-12
        assert abs(mine["measured_loss"] - other["measured_loss"]) < 1e-12
    assert two.stdout.count("files ") == one.stdout.count("files ") == 1
    again = torchrun(tmp_path / "two")
    assert again.returncode == 0, again.stderr
    assert "is finished already" in again.stderr
