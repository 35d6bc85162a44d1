"""Kernels against the definition of a mask and of an exchange, eager and compiled, with ties.

Without gradients, as a step's passes are: for the other mode a kernel would be compiled once more.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from permllm.config import NMPattern
from permllm.sparsity.nm import nm_mask
from permllm.sparsity.saliency import SaliencyFactors, saliency
from permllm.training.elementwise import Piece
from permllm.training.kernels import COMPILED, EAGER, ON_GPU, GPUKernels, Kernels, chosen_kernels

PATTERNS = [(2, 4), (1, 4), (3, 4), (4, 8), (6, 8), (12, 24)]
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def tied(n: int, m: int, power: int, with_row: bool) -> tuple[Piece, Tensor]:
    """Return a piece with few distinct values, whose groups are full of ties, and a gradient."""
    generator = torch.Generator().manual_seed(n * m + power)
    weight_t = torch.randint(-3, 4, (4 * m, 20), generator=generator).float()
    channels = torch.randperm(4 * m, generator=generator)[: 3 * m]
    column = torch.randint(1, 3, (2 if with_row else 1, 3 * m), generator=generator).float()
    row = torch.randint(1, 3, (2, 20), generator=generator).float() if with_row else None
    grad = torch.randn(4 * m, 20, generator=generator)
    return Piece(weight_t, channels, power, column, row, n, m), grad


def check_mask_and_gradients(
    kernels: Kernels, piece: Piece, grad: Tensor, dtype: torch.dtype, hard: bool
) -> None:
    weight = piece.of(piece.weight_t)
    score = saliency(weight.t(), SaliencyFactors(piece.power, piece.column, piece.row))
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
    ("n", "m", "power", "with_row", "dtype", "hard"),
    [
        (2, 4, 1, False, torch.bfloat16, True),
        pytest.param(2, 4, 1, False, torch.bfloat16, False, marks=slow),
        pytest.param(3, 4, 2, True, torch.float32, True, marks=slow),
        pytest.param(4, 8, 1, True, torch.float32, False, marks=slow),
    ],
)
def test_compiled_kernels_are_the_eager_ones(
    n: int, m: int, power: int, with_row: bool, dtype: torch.dtype, hard: bool
) -> None:
    check_mask_and_gradients(COMPILED, *tied(n, m, power, with_row), dtype, hard)


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("dense", [False, True])
def test_changes_are_those_of_a_loss_that_is_linear_in_the_mask(
    n: int, m: int, dense: bool
) -> None:
    check_changes(EAGER, torch.float64, n, m, dense)


@pytest.mark.parametrize(
    ("m", "dense"),
    [(4, False), pytest.param(4, True, marks=slow), pytest.param(8, False, marks=slow)],
)
def test_compiled_changes_are_those_too(m: int, dense: bool) -> None:
    check_changes(COMPILED, torch.float32, m // 2, m, dense)


def check_changes(kernels: Kernels, dtype: torch.dtype, n: int, m: int, dense: bool) -> None:
    rows, size, blocks = 6, 2 * m if m > 8 else 3 * m, 2
    generator = torch.Generator().manual_seed(n + m)
    weight_t = torch.randn(size * blocks, rows, generator=generator, dtype=dtype)
    column = torch.rand(rows if dense else 1, size * blocks, generator=generator, dtype=dtype) + 0.5
    grad = torch.randn(size * blocks, rows, generator=generator, dtype=dtype)
    order = torch.randperm(size * blocks, generator=generator)
    # A dense score lies as a masked linear has it, a channel a row.
    piece = Piece(weight_t, order, 1, column.t()[order].t(), None, n, m)
    masked = torch.empty_like(weight_t)
    found = kernels.exchanges(masked, piece, grad, size)
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


def test_without_a_driver_a_gpu_has_the_eager_functions(caplog: pytest.LogCaptureFixture) -> None:
    kernels = GPUKernels()
    piece, grad = tied(2, 4, 1, False)
    ours, theirs = (torch.zeros_like(grad) for _ in range(2))
    expected = EAGER.exchanges(theirs, piece, grad, 12)
    for _ in range(2):
        assert torch.equal(kernels.exchanges(ours, piece, grad, 12), expected)
        assert torch.equal(ours, theirs)
        kernels.mask(ours.zero_(), piece)
        assert torch.equal(ours, theirs)
    assert len(caplog.records) == 2


@pytest.mark.parametrize(
    ("device", "asked", "work", "m", "expected"),
    [
        ("cpu", None, 1e6, 4, EAGER),
        ("cpu", None, 1e12, 8, COMPILED),
        ("cpu", True, 1e6, 4, COMPILED),
        ("cpu", False, 1e12, 4, EAGER),
        ("cpu", True, 1e12, 16, EAGER),
        ("cuda", False, 1e6, 4, ON_GPU),
    ],
)
def test_a_cpu_compiles_where_that_pays(
    device: str, asked: bool | None, work: float, m: int, expected: Kernels
) -> None:
    patterns = [NMPattern(2, 4), NMPattern(m // 2, m)]
    assert chosen_kernels(torch.device(device), asked, work, patterns) is expected
