"""Triton kernels without a GPU, in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from permllm.sparsity.saliency import SaliencyFactors
from permllm.training.elementwise import ChannelChunk
from permllm.training.kernels import EAGER
from tests.conftest import ROOT

pytest.importorskip("triton", reason="no Triton on this platform")

# Triton decides when it is imported whether it interprets, so this is a process of its own.
CODE = """
import sys, torch
from permllm.permutation.lcp.assignment_triton import assign
from permllm.sparsity.saliency import SaliencyFactors
from permllm.training.elementwise import ChannelChunk
from permllm.training.triton_kernels import mask, swap_gradient
pieces, softs = torch.load(sys.argv[1])
made = []
for (weight, channels, factors, n, m), grad, size in pieces:
    piece = ChannelChunk(weight, channels, SaliencyFactors(*factors), n, m)
    masked, again = torch.zeros_like(grad), torch.zeros_like(grad)
    mask(masked, piece)
    made.append((masked, again, swap_gradient(again, piece, grad, size)))
torch.save((made, {name: assign(soft) for name, soft in softs.items()}), sys.argv[2])
"""


class Case(NamedTuple):
    """Input of a kernel: kind of numbers, dtype, N:M, block size, rows, kind of saliency."""

    numbers: str = "random"
    dtype: torch.dtype = torch.float32
    n: int = 2
    m: int = 4
    size: int = 16
    rows: int = 40
    form: str = "vector"
    power: int = 1


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = [
    Case(numbers, dtype) for numbers in ("random", "tied", "huge", "denormal") for dtype in DTYPES
]
CASES += [
    Case(n=1, size=20, rows=33),  # a tile of channels, of groups and of rows that is not full
    Case(n=3, m=6, size=24),
    Case(n=4, m=8, size=72, power=2),
    Case(n=8, m=16, size=64, dtype=torch.bfloat16),
    Case(form="two terms", size=68),
    Case(form="dense"),
    Case("tied", torch.bfloat16, form="dense", power=0),
]
KINDS = ("uniform", "near a permutation", "tied", "all equal", "of all sizes")
SIZES = (1, 5, 8)
INFINITE = (torch.nan, torch.inf, -torch.inf)
Found = tuple[list[tuple[Tensor, Tensor, Tensor]], dict[str, Tensor]]


def given(case: Case) -> tuple[ChannelChunk, Tensor]:
    """Return two blocks of a weight that has more channels, and the gradient of the weight."""
    generator = torch.Generator().manual_seed(case.m * case.size + case.rows)
    channels, rows = 2 * case.size, case.rows
    weight = torch.randn(channels + case.m, rows, generator=generator)
    wide = case.dtype != torch.float16
    if case.numbers == "tied":
        weight = weight.round().clamp(-1, 1)
    elif case.numbers == "huge":
        weight = weight.clamp(-3, 3) * 2.0 ** (120 if wide else 13)
    elif case.numbers == "denormal":
        weight = weight * 2.0 ** (-120 if wide else -20)
    weight = weight.to(case.dtype)
    grad = torch.randn(weight.shape, generator=generator).to(case.dtype)
    chosen = torch.randperm(len(weight), generator=generator)[:channels]
    row = torch.randint(1, 3, (2, rows), generator=generator).float()
    terms = {"vector": 1, "two terms": 2, "dense": rows}[case.form]
    column = torch.randint(1, 4, (channels, terms), generator=generator).float().t()
    if case.numbers == "denormal":  # saliencies are; the interpreter has no bfloat16 that is
        column = column * 2.0**-10
    if case.form == "dense":
        weight, grad = weight[:channels], grad[:channels]
    kept = None if case.form == "dense" else chosen
    factors = SaliencyFactors(case.power, column, row if case.form == "two terms" else None)
    return ChannelChunk(weight, kept, factors, case.n, case.m), grad


def blocks(kind: str, size: int) -> Tensor:
    """Return three soft permutations."""
    generator = torch.Generator().manual_seed(size)
    uniform = torch.rand(3, size, size, generator=generator)
    if kind == "near a permutation":
        return torch.eye(size)[torch.randperm(size, generator=generator)] + 0.3 * uniform
    if kind == "tied":
        return (3 * uniform).floor()
    if kind == "all equal":
        return torch.ones(3, size, size)
    if kind == "of all sizes":
        return (20 * uniform - 10).exp() * torch.randn(uniform.shape, generator=generator).sign()
    return uniform


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Return for each case two masked pieces and changes, and the solutions of blocks by name."""
    softs = {f"{kind} {size}": blocks(kind, size) for kind in KINDS for size in SIZES}
    for value in INFINITE:
        softs[str(value)] = blocks("uniform", 8)
        softs[str(value)][1, 3] = value
    softs["none"] = torch.zeros(0, 8, 8)
    softs["a view"] = blocks("uniform", 8).mT.contiguous().mT
    pieces = []
    for case in CASES:
        piece, grad = given(case)
        factors = piece.factors.power, piece.factors.column, piece.factors.row
        pieces.append((tuple(piece._replace(factors=factors)), grad, case.size))
    paths = [str(tmp_path_factory.mktemp("triton") / name) for name in ("given.pt", "found.pt")]
    torch.save((pieces, softs), paths[0])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", CODE, *paths], env=environment, check=True, timeout=300)
    made: Found = torch.load(paths[1])
    return made


@pytest.mark.parametrize("case", CASES, ids=str)
def test_masks_and_swap_gradients_are_the_eager_ones(found: Found, case: Case) -> None:
    masked, again, changes = found[0][CASES.index(case)]
    piece, grad = given(case)
    expected = torch.zeros_like(grad)
    of_swaps = EAGER.swap_gradient(expected, piece, grad, case.size)
    assert torch.equal(masked, expected)
    assert torch.equal(again, expected)
    assert of_swaps.isfinite().all()
    scale = float(of_swaps.abs().max())
    wanted = (of_swaps / scale).to(changes.dtype)
    torch.testing.assert_close(changes / scale, wanted, rtol=0, atol=4e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_an_assignment_is_as_good_as_scipys(found: Found, kind: str, size: int) -> None:
    soft, perms = blocks(kind, size), found[1][f"{kind} {size}"]
    assert perms.dtype == torch.int64
    for block, perm in zip(soft.double(), perms, strict=True):
        assert perm.sort().values.tolist() == list(range(size))
        row, column = linear_sum_assignment(block.numpy(), maximize=True)
        best = float(block.numpy()[row, column].sum())
        assert float(block[perm, torch.arange(size)].sum()) == pytest.approx(best, rel=1e-12)


def test_assignments_of_no_blocks_of_views_and_of_what_is_not_finite(found: Found) -> None:
    solved = found[1]
    assert solved["none"].shape == (0, 8)
    assert torch.equal(solved["a view"], solved["uniform 8"])
    for value in INFINITE:  # it ends, and leaves the other blocks
        assert torch.equal(solved[str(value)][[0, 2]], solved["uniform 8"][[0, 2]])
