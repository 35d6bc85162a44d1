"""On a machine with a GPU: the tiny pipeline and the Triton kernels."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from permllm import job
from permllm.config import read_config
from permllm.permutation.lcp.assignment import harden
from permllm.training.elementwise import Piece
from permllm.training.kernels import EAGER, ON_GPU
from tests.test_config import composed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
DEVICE = torch.device("cuda")


def run(directory: Path, *overrides: str) -> list[float]:
    """The loss of each pass of learning."""
    settings = (
        "model=tiny",
        "logger=none",
        "permutation.compile=true",
        f"run_dir={directory}",
        *overrides,
    )
    assert job.run(read_config(composed(*settings))) is not None
    return [
        json.loads(line)["loss"] for line in (directory / "history.jsonl").read_text().splitlines()
    ]


def test_the_tiny_pipeline(cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        there = run(tmp_path / "cuda", "compute_dtype=float32")
    assert "Triton kernel" not in caplog.text
    here = run(tmp_path / "cpu", "compute_dtype=float32", "model.device=cpu")
    assert there == pytest.approx(here, rel=1e-2)
    metrics = json.loads((tmp_path / "cuda" / "metrics.json").read_text())
    hardware = json.loads((tmp_path / "cuda" / "environment.json").read_text())["hardware"]
    assert hardware["device"] == "cuda:0"
    assert hardware["gpu"]["name"] == torch.cuda.get_device_name(0)
    assert metrics["sparsity"]["violations"] == 0
    assert 0 < metrics["peak_memory_bytes"] < 1 << 30
    for order in load_file(tmp_path / "cuda" / "permutations.safetensors").values():
        assert torch.equal(order.sort().values, torch.arange(len(order)))


def test_blocks_are_solved_where_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    near = torch.eye(64)[torch.randperm(64, generator=generator)] + 0.1 * torch.rand(
        300, 64, 64, generator=generator
    )
    for soft in (
        torch.rand(300, 64, 64, generator=generator),
        near,
        torch.rand(9, 24, 24, generator=generator),
    ):
        (there,), (here,) = harden([soft.to(DEVICE)]), harden([soft])
        there = there.cpu()
        values = [soft.double().gather(1, perm[:, None]).sum((1, 2)) for perm in (there, here)]
        torch.testing.assert_close(*values, rtol=0, atol=1e-9)
        assert torch.equal(there.sort().values, here.sort().values)
    with pytest.raises(ValueError, match="not finite"):
        harden([torch.full((1, 8, 8), torch.nan, device=DEVICE)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_in_triton_are_the_eager_ones(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight_t, grad = (torch.randn(256, 96, generator=generator).to(DEVICE, dtype) for _ in range(2))
    channels, column = (
        torch.randperm(256, generator=generator).to(DEVICE),
        torch.rand(1, 256, generator=generator).to(DEVICE),
    )
    piece = Piece(weight_t, channels, 1, column, None)
    ours, theirs = torch.zeros_like(grad), torch.zeros_like(grad)
    changes = [
        form.exchanges(out, piece, grad, 2, 4, 32)
        for form, out in ((ON_GPU, ours), (EAGER, theirs))
    ]
    torch.testing.assert_close(*changes, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours, theirs)
    ON_GPU.mask(ours.zero_(), piece, 2, 4)
    assert torch.equal(ours, theirs)
    assert not caplog.messages
