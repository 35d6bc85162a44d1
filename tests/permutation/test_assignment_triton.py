"""Solver of assignments of a GPU, in Triton's interpreter: as good as SciPy's for any numbers."""

from __future__ import annotations

import importlib

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from tests.triton_code import ARCHITECTURES, interpreted, spilled_bytes

pytest.importorskip("triton", reason="no Triton on this platform")

KINDS = ("uniform", "near a permutation", "tied", "all equal", "of all sizes")
SIZES = (1, 5, 8)
CODE = """
from permllm.permutation.lcp.assignment_triton import assign
found = {name: assign(soft) for name, soft in given.items()}
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
        signs = 1 - 2 * torch.randint(0, 2, (3, size, size), generator=generator)
        return (20 * uniform - 10).exp() * signs
    return uniform


@pytest.fixture(scope="module")
def solved() -> dict[str, Tensor]:
    """Return the kernel's solutions of all blocks here, by name."""
    softs = {f"{kind} {size}": blocks(kind, size) for kind in KINDS for size in SIZES}
    for value in (torch.nan, torch.inf, -torch.inf):
        softs[str(value)] = blocks("uniform", 8)
        softs[str(value)][1, 3] = value
    softs["none"] = torch.zeros(0, 8, 8)
    softs["a view"] = blocks("uniform", 8).mT.contiguous().mT
    found: dict[str, Tensor] = interpreted(CODE, softs)
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


def test_no_blocks_views_and_what_is_not_finite(solved: dict[str, Tensor]) -> None:
    assert solved["none"].shape == (0, 8)
    assert torch.equal(solved["a view"], solved["uniform 8"])
    for value in (torch.nan, torch.inf, -torch.inf):  # it ends, and leaves the other blocks
        assert torch.equal(solved[str(value)][[0, 2]], solved["uniform 8"][[0, 2]])


@pytest.mark.parametrize(
    ("size", "architecture"),
    [(64, architecture) for architecture in ARCHITECTURES]
    + [pytest.param(size, 90, marks=pytest.mark.slow) for size in (16, 1024)],
)
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")
def test_gpus_keep_the_state_of_a_block_in_registers(size: int, architecture: int) -> None:
    kernel = importlib.import_module("permllm.permutation.lcp.assignment_triton")._assign
    types = {"soft": "*fp32", "perms": "*i64", "size": "i32:16"}
    warps = max(1, min(8, size // 64))
    assert spilled_bytes(kernel, types, {"LANES": size}, architecture, warps) <= 64
