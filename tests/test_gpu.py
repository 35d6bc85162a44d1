"""On a machine with a GPU: the tiny pipeline and the Triton kernels."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from permllm import job
from permllm.permutation.lcp.assignment import harden
from permllm.pruning import methods
from permllm.settings.config import read_config
from permllm.sparsity.saliency import SaliencyFactors
from permllm.store.files import read_lines
from permllm.training.elementwise import ChannelChunk
from permllm.training.kernels import EAGER, ON_GPU
from tests.conftest import ROOT
from tests.settings.test_config import composed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
DEVICE = torch.device("cuda")
SHAPES = ((300, 64), (9, 24))  # of blocks


def run(directory: Path, *overrides: str) -> list[float]:
    """Return the loss of each epoch of learning."""
    settings = (
        "model=tiny-random",
        "logger=none",
        f"run_dir={directory}",
    )
    assert job.run(read_config(composed(*settings, *overrides))) is not None
    return [line["loss"] for line in read_lines(directory / "history.jsonl")]


def test_the_tiny_pipeline(cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        there = run(tmp_path / "cuda", "permutation.compile=true", "compute_dtype=float32")
    assert "Triton kernel" not in caplog.text
    here = run(
        tmp_path / "cpu", "permutation.compile=true", "compute_dtype=float32", "model.device=cpu"
    )
    assert there == pytest.approx(here, rel=1e-2)
    metrics = json.loads((tmp_path / "cuda" / "metrics.json").read_text())
    hardware = json.loads((tmp_path / "cuda" / "environment.json").read_text())["hardware"]
    assert hardware["device"] == "cuda:0"
    assert hardware["gpu"]["name"] == torch.cuda.get_device_name(0)
    assert metrics["sparsity"]["violations"] == 0
    assert 0 < metrics["peak_memory_bytes"] < 1 << 30
    for order in load_file(tmp_path / "cuda" / "permutations.safetensors").values():
        assert torch.equal(order.sort().values, torch.arange(len(order)))


@pytest.mark.parametrize("most_states", [4e9, 0.0], ids=["stored", "teacher"])
def test_weights_learn_from_stored_states_and_from_a_teacher(
    most_states: float, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "MOST_STATES", most_states)
    assert_finished(tmp_path, "permutation=none", "reconstruction=distill")


@pytest.mark.parametrize(
    "words",
    [
        ["permutation=lcp", "model.placement=host"],
        ["mask=score"],
        ["mask=gumbel"],
        ["mask=lowrank", "permutation=none"],
        ["mask=score", "model.placement=host"],
        ["allocation=sensitive", "allocation.share=0.3"],
        ["permutation=lcp", "model.dtype=float16"],
        ["reconstruction=distill", "model.dtype=bfloat16"],
        ["permutation=lcp", "permutation.constraint=foldable", "export=folded"],
        ["permutation=lcp", "export=gathered"],
        ["permutation=none", "evaluation.weights=fp8"],
    ],
    ids="_".join,
)
def test_methods(words: list[str], cache: Path, tmp_path: Path) -> None:
    assert_finished(tmp_path, *words)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks(cache: Path, tmp_path: Path) -> None:
    words = ["run.py", "model=tiny-random", "permutation=lcp", "logger=none", f"run_dir={tmp_path}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launcher, *words], cwd=ROOT, check=True)
    assert json.loads((tmp_path / "metrics.json").read_text())["status"] == "finished"


def assert_finished(directory: Path, *words: str) -> None:
    """Run a job on the GPU, and check that it pruned to finite perplexities."""
    run(directory, *words)
    metrics = json.loads((directory / "metrics.json").read_text())
    assert metrics["status"] == "finished"
    assert metrics["sparsity"]["violations"] == 0
    for values in metrics["perplexity"]["sparse"].values():
        assert 1 < values["value"] < float("inf")


def test_blocks_are_solved_where_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    softs = [torch.rand(count, size, size, generator=generator) for count, size in SHAPES]
    softs.append(torch.eye(64)[torch.randperm(64, generator=generator)] + 0.1 * softs[0])
    for soft in softs:
        (there,), (here,) = harden([soft.to(DEVICE)]), harden([soft])
        values = [
            soft.double().gather(1, perm[:, None]).sum((1, 2)) for perm in (there.cpu(), here)
        ]
        torch.testing.assert_close(*values, rtol=0, atol=1e-9)
        assert torch.equal(there.cpu().sort().values, here.sort().values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_in_triton_are_the_eager_ones(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight_t, grad = (torch.randn(256, 96, generator=generator).to(DEVICE, dtype) for _ in range(2))
    channels = torch.randperm(256, generator=generator).to(DEVICE)
    column = torch.rand(1, 256, generator=generator).to(DEVICE)
    piece = ChannelChunk(weight_t, channels, SaliencyFactors(1, column), 2, 4)
    ours, theirs = torch.zeros_like(grad), torch.zeros_like(grad)
    changes = [
        ON_GPU.swap_gradient(ours, piece, grad, 32),
        EAGER.swap_gradient(theirs, piece, grad, 32),
    ]
    torch.testing.assert_close(*changes, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours, theirs)
    ON_GPU.mask(ours.zero_(), piece)
    assert torch.equal(ours, theirs)
    assert not caplog.messages
