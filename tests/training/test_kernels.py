"""Compiled and eager kernels are the same mathematics, ties and all.

What is compiled runs here on every pattern as it stands, and compiled on some: a compiler takes seconds for each. Without
gradients, as a step's passes do: for the other mode it would be compiled once more.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from permllm.config import NMPattern
from permllm.mask.score import ScoreMask
from permllm.pruning.sparsegpt import SparseGPT
from permllm.runtime.precision import products_in
from permllm.sparsity.nm import nm_mask
from permllm.sparsity.saliency import SaliencyFactors, saliency
from permllm.training import kernels, losses, masked_linear
from permllm.training.kernels import EAGER, Kernels, KernelUse, compiled_kernels
from permllm.training.loop import Training
from tests.conftest import tiny_model
from tests.pruning.test_layerwise import lcp, problem


@pytest.fixture(scope="module")
def compiled() -> Kernels:
    found = compiled_kernels(KernelUse("cpu"))
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def not_compiled(device_type: str) -> Kernels:
    """What is compiled for a device, as it stands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels.torch, "compile", lambda form, **_: form)
        return kernels._compiled(KernelUse(device_type))


@pytest.fixture(scope="module")
def by_places() -> Kernels:
    return not_compiled("cpu")


@pytest.fixture(scope="module")
def anew() -> Kernels:
    return not_compiled("cuda")


# N, M, power of the magnitude, factors of rows, the hard gradient.
CASES = [(2, 4, 1, False, True), (2, 4, 1, False, False), (1, 4, 2, False, True), (4, 8, 1, True, False)]
WIDE = [(2, 8, 1, False, True), (6, 8, 2, False, False), (8, 16, 1, True, True)]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES + WIDE)
def test_places_and_eager_agree(by_places: Kernels, case: tuple[int, int, int, bool, bool], dtype: torch.dtype) -> None:
    check_mask_and_gradient(by_places, *case, dtype)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (CASES[0], torch.bfloat16),
        ((3, 4, 2, True, False), torch.float32),
        pytest.param(CASES[3], torch.float32, marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_compiled_and_eager_agree(compiled: Kernels, case: tuple[int, int, int, bool, bool], dtype: torch.dtype) -> None:
    check_mask_and_gradient(compiled, *case, dtype)


def check_mask_and_gradient(
    kernels: Kernels, n: int, m: int, power: int, with_row: bool, hard: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(n * m + power)
    # Few distinct values: the groups are full of ties.
    weight_t = torch.randint(-3, 4, (48, 20), generator=generator).float()
    channels = torch.randperm(48, generator=generator)[: 3 * m]
    terms = 2 if with_row else 1
    column = torch.randint(1, 3, (terms, 3 * m), generator=generator).float()
    row = torch.randint(1, 3, (terms, 20), generator=generator).float() if with_row else None
    grad = torch.randn(48, 20, generator=generator)
    piece: tuple[Any, ...] = (weight_t, channels, power, column, row)
    score = saliency(weight_t[channels].t(), SaliencyFactors(power, column, row))
    expected = (weight_t[channels].t() * nm_mask(score, NMPattern(n, m))).t()
    for form in (EAGER, kernels):
        torch.testing.assert_close(form.mask(*piece, n, m, dtype), expected.to(dtype))
    ours, theirs = (form.gradient(*piece, grad, n, m, dtype, hard) for form in (kernels, EAGER))
    torch.testing.assert_close(ours[0], expected.to(dtype))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize(
    ("n", "m", "dense"),
    [(2, 4, False), (2, 4, True), (1, 4, False), (3, 4, False), (4, 8, False), (2, 8, True), (6, 8, False), (8, 16, False)],
)
def test_changes_are_those_of_a_loss_that_is_linear_in_the_mask(
    by_places: Kernels, anew: Kernels, n: int, m: int, dense: bool
) -> None:
    for form in (EAGER, by_places, anew):
        check_changes(form, torch.float64, n, m, dense)


@pytest.mark.parametrize(("m", "dense"), [(4, False), (4, True), pytest.param(8, False, marks=pytest.mark.slow)])
@torch.no_grad()
def test_compiled_changes_are_those_too(compiled: Kernels, m: int, dense: bool) -> None:
    check_changes(compiled, torch.float32, m // 2, m, dense)


def check_changes(kernels: Kernels, dtype: torch.dtype, n: int, m: int, dense: bool) -> None:
    rows, size, blocks = 6, 3 * m, 2
    generator = torch.Generator().manual_seed(n + m)
    weight_t = torch.randn(size * blocks, rows, generator=generator, dtype=dtype)
    column = torch.rand(rows if dense else 1, size * blocks, generator=generator, dtype=dtype) + 0.5
    grad = torch.randn(size * blocks, rows, generator=generator, dtype=dtype)
    order = torch.randperm(size * blocks, generator=generator)
    # A dense score lies as a masked linear has it, a channel a row.
    masked, found = kernels.exchanges(weight_t, order, 1, column.t()[order].t(), None, grad, n, m, dtype, size)
    score, slope = (weight_t.abs() * column.t())[order].double(), (weight_t * grad)[order].double()
    groups = torch.arange(size * blocks).view(-1, m).tolist()
    torch.testing.assert_close(
        masked.double(), weight_t[order].double() * nm_mask(score.t(), NMPattern(n, m)).t(), rtol=1e-6, atol=1e-6
    )

    def loss(members: list[int]) -> float:
        """Of one group of any size that keeps its n largest entries in each row."""
        kept = score[members].topk(min(n, len(members)), dim=0).indices
        return float(slope[members].gather(0, kept).sum())

    for block in range(blocks):
        mine = groups[block * size // m : (block + 1) * size // m]
        for channel in range(size):
            position = block * size + channel
            for index, group in enumerate(mine):
                if position in group:
                    expected = loss(group) - loss([p for p in group if p != position])
                else:
                    without = [[p for p in group if p != leaving] for leaving in group]
                    expected = sum(loss([*rest, position]) - loss(rest) for rest in without) / m
                assert float(found[block, channel, index]) == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    ("straight_through", "kernel"),
    [("swap", "_mask_by_places"), ("swap", "_exchange_by_places"), ("swap", "_foreign"), ("soft", "_gradient_by_places")],
)
def test_a_kernel_that_cannot_be_compiled_is_a_warning_before_learning_and_no_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, straight_through: str, kernel: str
) -> None:
    """One kernel alone fails, at its first call, as a compiler does: not only the mask's may be what it cannot do."""

    def broken(*_: Any) -> Any:
        raise RuntimeError("no compiler found\nand a long story")

    monkeypatch.setattr(kernels.torch, "compile", lambda form, **_: broken if form.__name__ == kernel else form)
    compiled_kernels.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert compiled_kernels(KernelUse("cpu", straight_through)) is None
    compiled_kernels.cache_clear()
    assert "learning runs without compiled kernels: no compiler found" in caplog.text
    assert "story" not in caplog.text


def test_the_mask_of_wide_groups_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """By places it would take a compiler minutes, to be slower."""
    tried: list[str] = []

    def recorded(form: Any, **_: Any) -> Any:
        return lambda *piece: (tried.append(form.__name__), form(*piece))[1]

    monkeypatch.setattr(kernels.torch, "compile", recorded)
    for pattern, expected in ((NMPattern(4, 8), ["_select_by_places"]), (NMPattern(8, 16), [])):
        compiled_kernels.cache_clear()
        assert compiled_kernels(KernelUse("cpu", None, pattern)) is not None
        assert tried == expected
        tried.clear()
    compiled_kernels.cache_clear()


@pytest.mark.parametrize("straight_through", ["swap", "hard", "soft"])
@pytest.mark.parametrize("form", ["row", "dense"])
def test_what_is_tried_is_what_a_step_uses(monkeypatch: pytest.MonkeyPatch, straight_through: str, form: str) -> None:
    monkeypatch.setattr(kernels.torch, "compile", lambda form, **_: form)
    compiled_kernels.cache_clear()
    use = KernelUse("cpu", straight_through, NMPattern(4, 8), torch.bfloat16, torch.bfloat16, **{form: True})
    assert compiled_kernels(use) is not None
    compiled_kernels.cache_clear()


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("straight_through", [None, "swap", "hard", "soft"])
def test_nothing_is_compiled_in_a_step(monkeypatch: pytest.MonkeyPatch, straight_through: Any, parts: int) -> None:
    """What was tried before is of the sizes, formats and modes of a step, so that the compiler need not come again."""

    def pieces(layout: Any, weight: Tensor) -> Iterator[tuple[int, slice, slice]]:
        for index, stack in enumerate(layout.stacks):
            for first, last in itertools.pairwise(range(0, stack.count + 1, stack.count // parts)):
                yield index, slice(first, last), slice(stack.start + first * stack.size, stack.start + last * stack.size)

    monkeypatch.setattr(masked_linear, "_pieces", pieces)  # of a large layer a piece is not the whole
    compile_, run = torch.compile, Training.run
    backend = CompileCounter()  # type: ignore[no-untyped-call]
    in_steps: list[int] = []

    def counting(self: Training) -> None:
        before = backend.frame_count
        run(self)
        in_steps.append(backend.frame_count - before)

    monkeypatch.setattr(torch, "compile", lambda form, **options: compile_(form, backend=backend, **options))
    monkeypatch.setattr(Training, "run", counting)
    learning = problem(tiny_model("llama"), SparseGPT())
    compiled_kernels.cache_clear()
    losses._compiled_divergence.cache_clear()
    try:
        with products_in(torch.bfloat16, torch.device("cpu")):
            if straight_through is None:
                orders = {group.name: torch.randperm(group.channels) for group in learning.groups}
                ScoreMask(batch_size=3, loss="kl", compile=True).masks(learning, orders)
            else:
                lcp(block_size=8, loss="kl", straight_through=straight_through, compile=True).orders(learning)
    finally:
        compiled_kernels.cache_clear()
        losses._compiled_divergence.cache_clear()
    assert backend.frame_count
    assert in_steps == [0]
