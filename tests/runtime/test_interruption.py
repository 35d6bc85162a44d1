"""`kill -9` in the middle of learning loses at most one pass, and the same command ends with the same result."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.conftest import ROOT, run_command

EPOCHS = 8
OVERRIDES = (
    "model=tiny",
    "logger=none",
    "calibration.samples=8",
    f"permutation.epochs={EPOCHS}",
    "permutation.learning_rate=0.05",
    "permutation.batch_size=1",
    "run_dir=run",
)


def test_a_killed_run_continues_to_the_same_result(tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    assert run_command(*OVERRIDES, cwd=tmp_path / "whole").returncode == 0
    environment = os.environ | {"PERMLLM_CACHE": str(tmp_path / "killed" / "cache")}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *OVERRIDES],
        cwd=tmp_path / "killed",
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    history = tmp_path / "killed" / "run" / "history.jsonl"
    give_up = time.monotonic() + 300
    while not (history.is_file() and len(history.read_text().splitlines()) >= 3):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < give_up
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(history.read_text().splitlines())
    assert before < EPOCHS
    done = torch.load(tmp_path / "killed" / "run" / "lcp_checkpoint.pt", weights_only=True)["done"]
    continued = run_command(*OVERRIDES, cwd=tmp_path / "killed")
    assert continued.returncode == 0, continued.stderr
    # The pass that was cut short is the only one that ran again. Its state is written just before its line.
    assert done in (before, before + 1)
    assert f"continuing after epoch {done}" in continued.stderr
    assert len(history.read_text().splitlines()) == EPOCHS - (done - before)
    whole, resumed = (load_file(tmp_path / name / "run" / "permutations.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(not torch.equal(order, torch.arange(len(order))) for order in whole.values())
    masks = [(tmp_path / name / "run" / "masks.safetensors").read_bytes() for name in ("whole", "killed")]
    assert masks[0] == masks[1]
