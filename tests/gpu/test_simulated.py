"""The tiny pipeline and a step of LLaMA's size on a CUDA device that is simulated: what would crash there, and what waits."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ByT5Tokenizer

from tests.conftest import ROOT, tiny_model
from tests.gpu.pipeline import JOBS, RESUMED

pytestmark = pytest.mark.skipif(
    torch.backends.cuda.is_built() or shutil.which("g++") is None,
    reason="the simulated device needs a CPU build of torch and g++",
)


def python(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"} | environment
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=900, check=False)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What became of each job of the pipeline, run once in a process of its own."""
    folder = tmp_path_factory.mktemp("simulated")
    result = python("-m", "tests.gpu.pipeline", str(folder), PERMLLM_CACHE=str(folder / "cache"))
    assert result.returncode == 0, result.stderr
    return dict(json.loads(result.stdout.splitlines()[-1]))


def test_the_simulator_refuses_and_counts_what_it_promises() -> None:
    result = python("-m", "tests.gpu.simulated", "--self-test")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("ok: ") == 13


@pytest.mark.parametrize("name", [*JOBS, RESUMED])
def test_a_job_ends_on_the_device_with_the_orders_and_masks_of_the_host(found: dict[str, Any], name: str) -> None:
    job = found[name]
    assert "error" not in job, job["error"]
    assert job["device"] == "cuda:0"
    assert job["same"] == [True, True]
    assert job["peak"] > 0


@pytest.mark.parametrize("name", [name for name in JOBS if name.startswith(("lcp", "bfloat16", "opt"))])
def test_a_step_of_learning_waits_for_the_device_three_times_at_most(found: dict[str, Any], name: str) -> None:
    job = found[name]
    assert job["steps"] >= 4  # not of the run on the host, which comes after
    # Where layers come and go the host waits for one that it left before the last, while the device computes with the next.
    behind = sum(float(line.split()[0]) for line in job["lines"] if "synchronize permllm/models/placement.py" in line)
    assert (behind > 0) == (name == "lcp from host memory")
    assert job["waits"] - behind <= 3, job["lines"]
    assert job["pageable"] == []


def test_a_run_through_the_command_line_chooses_the_device_by_itself_and_reads_its_model_onto_it(tmp_path: Path) -> None:
    tiny_model("qwen3").save_pretrained(tmp_path / "model")
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "model")
    small = ("model=local", "model.path=model", "calibration=builtin", "evaluation=builtin", "calibration.samples=2")
    simulator = str(ROOT / "tests" / "gpu" / "simulated.py")
    # The simulator sees the main thread alone, and transformers would read weights in others.
    environment = {"PERMLLM_CACHE": str(tmp_path / "cache"), "HF_DEACTIVATE_ASYNC_LOAD": "1"}
    command = (simulator, str(ROOT / "run.py"), *small, "permutation=none", "logger=none", "run_dir=run")
    result = python(*command, cwd=tmp_path, **environment)
    assert result.returncode == 0, result.stderr
    # Weight by weight as they are read, and not by a model in host memory that moves.
    assert re.search(r"host to device.* permllm/models/checkpoint\.py:\d+ > core_model_loading\.py", result.stderr)
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["hardware"]["gpu"]["name"] == "simulated H100"


@pytest.fixture(scope="module")
def llama() -> dict[str, Any]:
    result = python("-m", "tests.gpu.llama_step")
    assert result.returncode == 0, result.stderr
    return dict(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize("kernels", ["compiled", "eager"])
def test_a_step_of_the_size_of_llama_waits_three_times(llama: dict[str, Any], kernels: str) -> None:
    assert llama[kernels]["syncs"] <= 3


def test_a_step_of_the_size_of_llama_is_few_launches_and_brings_few_soft_permutations_to_the_host(
    llama: dict[str, Any],
) -> None:
    two, three = llama["two layers"], llama["compiled"]
    # 32 layers of which each takes what the third took.
    whole = {name: three[name] + 29 * (three[name] - two[name]) for name in ("launches", "traffic")}
    assert whole["launches"] <= 10_000
    assert whole["traffic"] <= 700e9
    # The batch and what it is compared with, in bfloat16, and its tokens; of the soft permutations at most two thirds.
    batch, softs = 4 * 1024 * (2 * 4096 * 2 + 2 * 8), 3 * 4 * 64 * (3 * 4096 + 11008)
    assert three["transferred"] <= batch + softs * 2 / 3


def test_layers_are_recomputed_where_a_gpu_has_no_room_for_what_they_keep(llama: dict[str, Any]) -> None:
    assert not llama["compiled"]["recomputes"]
    assert llama["small card"]["recomputes"]
    assert llama["small card"]["kept"] < llama["compiled"]["kept"] / 5
    for kernels in ("compiled", "eager"):
        assert 0.8 < llama[kernels]["kept"] / llama["estimate"] < 1.02
