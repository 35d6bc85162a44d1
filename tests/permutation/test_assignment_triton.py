"""The GPU's solver of assignments, in Triton's interpreter: as good as SciPy's, whatever the numbers."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from tests.conftest import ROOT
from tests.triton_code import ARCHITECTURES, spilled_bytes

pytest.importorskip("triton", reason="no Triton on this platform")

KINDS = ("uniform", "near a permutation", "tied", "all equal", "of all sizes")
SIZES = (1, 2, 5, 8, 16)
# Triton decides when it is imported whether it interprets: an interpreter of its own.
CHILD = """
import sys, torch
from permllm.permutation.lcp.assignment_triton import assign
softs = torch.load(sys.argv[1])
torch.save({name: assign(soft) for name, soft in softs.items()}, sys.argv[2])
"""


def blocks(kind: str, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    uniform = torch.rand(3, size, size, generator=generator)
    if kind == "near a permutation":
        return torch.eye(size)[torch.randperm(size, generator=generator)] + 0.3 * uniform
    if kind == "tied":
        return torch.randint(0, 3, (3, size, size), generator=generator).float()
    if kind == "all equal":
        return torch.ones(3, size, size)
    if kind == "of all sizes":
        return (20 * uniform - 10).exp() * (
            1 - 2 * torch.randint(0, 2, (3, size, size), generator=generator)
        )
    return uniform


def broken(value: float) -> Tensor:
    soft = blocks("uniform", 8)
    soft[1, 3] = value
    return soft


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What the kernel makes of all blocks here, by name."""
    softs = {f"{kind} {size}": blocks(kind, size) for kind in KINDS for size in SIZES}
    softs |= {str(value): broken(value) for value in (torch.nan, torch.inf, -torch.inf)}
    softs["none"] = torch.zeros(0, 8, 8)
    softs["a view"] = blocks("uniform", 8).mT.contiguous().mT
    folder = tmp_path_factory.mktemp("kernel")
    torch.save(softs, folder / "softs.pt")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CHILD, str(folder / "softs.pt"), str(folder / "perms.pt")]
    subprocess.run(command, env=environment, check=True, timeout=300)
    found: dict[str, Tensor] = torch.load(folder / "perms.pt")
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_it_is_as_good_as_scipy(solved: dict[str, Tensor], kind: str, size: int) -> None:
    soft, perms = blocks(kind, size), solved[f"{kind} {size}"]
    assert perms.dtype == torch.int64
    for block, perm in zip(soft.double(), perms, strict=True):
        assert perm.sort().values.tolist() == list(range(size))
        row, column = linear_sum_assignment(block.numpy(), maximize=True)
        best = float(block.numpy()[row, column].sum())
        assert float(block[perm, torch.arange(size)].sum()) == pytest.approx(best, rel=1e-12)


def test_no_blocks_are_no_launch(solved: dict[str, Tensor]) -> None:
    assert solved["none"].shape == (0, 8)


def test_a_view_is_read_as_it_is(solved: dict[str, Tensor]) -> None:
    assert torch.equal(solved["a view"], solved["uniform 8"])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_ends_and_leaves_the_other_blocks(
    solved: dict[str, Tensor], value: float
) -> None:
    perms = solved[str(value)]
    assert torch.equal(perms[[0, 2]], solved["uniform 8"][[0, 2]])


@pytest.mark.parametrize("size", [16, 64, 1024])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")
def test_gpus_keep_the_state_of_a_block_in_registers(size: int, architecture: int) -> None:
    kernel = importlib.import_module("permllm.permutation.lcp.assignment_triton")._assign
    types = {"soft": "*fp32", "perms": "*i64", "size": "i32:16"}
    warps = max(1, min(8, size // 64))
    assert spilled_bytes(kernel, types, {"LANES": size}, architecture, warps) <= 64
