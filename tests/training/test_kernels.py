"""Kernels against the definition of a mask and of a swap, eager and compiled, with ties.

Without gradients, as a step's passes are: for the other mode a kernel would be compiled once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from permllm.settings.config import NMPattern
from permllm.sparsity.nm import nm_mask
from permllm.sparsity.saliency import SaliencyFactors, saliency
from permllm.training.elementwise import ChannelChunk
from permllm.training.kernels import COMPILED, EAGER, ON_GPU, GPUKernels, Kernels, chosen_kernels
from tests.problems import method, problem, random, shuffled

PATTERNS = [(2, 4), (1, 4), (6, 8), (12, 24)]
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def tied(n: int, m: int, power: int, with_row: bool) -> tuple[ChannelChunk, Tensor]:
    """Return a piece with few distinct values, whose groups are full of ties, and a gradient."""

    def few(*shape: int) -> Tensor:
        return random(*shape).float().abs().clamp(0.5, 2).round()

    weight_t, row = few(4 * m, 20) * random(4 * m, 20).sign().float(), few(2, 20)
    column = few(2 if with_row else 1, 3 * m)
    factors = SaliencyFactors(power, column, row if with_row else None)
    piece = ChannelChunk(weight_t, shuffled(4 * m)[: 3 * m], factors, n, m)
    return piece, random(4 * m, 20, seed=1).float()


def check_mask_and_gradients(
    kernels: Kernels, piece: ChannelChunk, grad: Tensor, dtype: torch.dtype, hard: bool
) -> None:
    weight = piece.of(piece.weight_t)
    score = saliency(weight.t(), piece.factors)
    kept = nm_mask(score, NMPattern(piece.n, piece.m)).t()
    expected = torch.zeros_like(grad, dtype=dtype)
    expected[piece.channels] = torch.where(kept, weight, 0.0).to(dtype)  # type: ignore[index]
    outs = [torch.zeros_like(expected) for _ in range(3)]
    kernels.mask(outs[0], piece)
    ours = kernels.softmax_gradients(outs[1], piece, grad, dtype, hard)
    theirs = EAGER.softmax_gradients(outs[2], piece, grad, dtype, hard)
    assert all(torch.equal(out, expected) for out in outs)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_a_piece_is_written_under_its_mask(n: int, m: int) -> None:
    for hard in (True, False):
        check_mask_and_gradients(EAGER, *tied(n, m, 1, False), torch.bfloat16, hard)


@pytest.mark.parametrize(
    ("given", "dtype", "hard"),
    [
        ((2, 4, 1, False), torch.bfloat16, True),
        pytest.param((2, 4, 1, False), torch.bfloat16, False, marks=slow),
        pytest.param((3, 4, 2, True), torch.float32, True, marks=slow),
        pytest.param((4, 8, 1, True), torch.float32, False, marks=slow),
    ],
)
def test_compiled_kernels_are_the_eager_ones(given: Any, dtype: torch.dtype, hard: bool) -> None:
    check_mask_and_gradients(COMPILED, *tied(*given), dtype, hard)


WAYS = [(EAGER, n, m, dense) for n, m in PATTERNS for dense in (False, True)]
WAYS += [(COMPILED, 2, 4, False)]
MORE = [pytest.param(COMPILED, 2, 4, True, marks=slow)]
MORE += [pytest.param(COMPILED, 4, 8, False, marks=slow)]


@pytest.mark.parametrize(("kernels", "n", "m", "dense"), [*WAYS, *MORE])
def test_changes_are_those_of_a_loss_that_is_linear_in_the_mask(
    kernels: Kernels, n: int, m: int, dense: bool
) -> None:
    rows, size, blocks = 6, 2 * m if m > 8 else 3 * m, 2
    dtype = torch.float64 if kernels is EAGER else torch.float32
    weight_t, grad = (random(size * blocks, rows, seed=seed).to(dtype) for seed in range(2))
    column = random(rows if dense else 1, size * blocks, seed=2).to(dtype).abs() + 0.5
    order = shuffled(size * blocks)
    # A dense score lies as a masked linear has it, a channel a row.
    piece = ChannelChunk(weight_t, order, SaliencyFactors(1, column.t()[order].t()), n, m)
    masked = torch.empty_like(weight_t)
    found = kernels.swap_gradient(masked, piece, grad, size)
    score, slope = (weight_t.abs() * column.t())[order].double(), (weight_t * grad)[order].double()
    kept = nm_mask(score.t(), NMPattern(n, m)).t()
    assert torch.equal(masked[order], torch.where(kept, weight_t[order], 0.0))

    def loss(members: list[int]) -> float:
        """Return the loss of a group of any size that keeps its n largest entries in each row."""
        kept = score[members].topk(min(n, len(members)), dim=0).indices
        return float(slope[members].gather(0, kept).sum())

    groups = torch.arange(size * blocks).view(blocks, -1, m).tolist()
    for position in range(size * blocks):
        block = position // size
        for index, group in enumerate(groups[block]):
            without = [[p for p in group if p != leaving] for leaving in group]
            if position in group:
                expected = loss(group) - loss(without[group.index(position)])
            else:
                expected = sum(loss([*rest, position]) - loss(rest) for rest in without) / m
            value = float(found[block, position % size, index])
            assert value == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.usefixtures("kernels_may_fail")
def test_without_a_driver_a_gpu_has_the_eager_functions(caplog: pytest.LogCaptureFixture) -> None:
    kernels = GPUKernels()
    piece, grad = tied(2, 4, 1, False)
    ours, theirs = (torch.zeros_like(grad) for _ in range(2))
    expected = EAGER.swap_gradient(theirs, piece, grad, 12)
    for _ in range(2):
        assert torch.equal(kernels.swap_gradient(ours, piece, grad, 12), expected)
        assert torch.equal(ours, theirs)
        kernels.mask(ours.zero_(), piece)
        assert torch.equal(ours, theirs)
    assert len(caplog.records) == 2


@pytest.mark.parametrize(
    ("asked", "steps", "m", "expected"),
    [
        (None, 10, 4, EAGER),
        (None, 10**7, 8, COMPILED),
        (True, 10, 4, COMPILED),
        (False, 10**7, 4, EAGER),
        (True, 10**7, 16, EAGER),
    ],
)
def test_a_cpu_compiles_where_that_pays(
    asked: bool | None, steps: int, m: int, expected: Kernels
) -> None:
    learning = problem(pattern=NMPattern(m // 2, m))
    settings = method("mask=score", compile=asked, steps=steps)
    assert chosen_kernels(settings, learning, learning.groups) is expected
    on_a_gpu: Any = SimpleNamespace(device=torch.device("cuda"))
    assert chosen_kernels(settings, on_a_gpu, learning.groups) is ON_GPU
