"""Kernels of a GPU: the eager functions in Triton's interpreter; compiled without spills."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from permllm.training.elementwise import Piece
from permllm.training.kernels import EAGER
from tests.triton_code import ARCHITECTURES, interpreted, spilled_bytes

pytest.importorskip("triton", reason="no Triton on this platform")


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


CASES = [
    Case(numbers, dtype)
    for numbers in ("random", "tied", "huge", "denormal")
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
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
CODE = """
from permllm.training.elementwise import Piece
from permllm.training.triton_kernels import exchanges, mask
found = []
for piece, grad, size in given:
    masked, again = torch.zeros_like(grad), torch.zeros_like(grad)
    mask(masked, Piece(*piece))
    found.append((masked, again, exchanges(again, Piece(*piece), grad, size)))
"""


def given(case: Case) -> tuple[Piece, Tensor]:
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
    terms_of_rows = row if case.form == "two terms" else None
    return Piece(weight, kept, case.power, column, terms_of_rows, case.n, case.m), grad


@pytest.fixture(scope="module")
def found() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return for each case two results for masks, the second made with the exchanges, and these."""
    asked = [(*given(case), case.size) for case in CASES]
    made = interpreted(CODE, [(tuple(piece), grad, size) for piece, grad, size in asked])
    return made  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_they_are_the_eager_functions(
    found: list[tuple[Tensor, Tensor, Tensor]], case: Case
) -> None:
    masked, again, changes = found[CASES.index(case)]
    piece, grad = given(case)
    expected = torch.zeros_like(grad)
    of_exchanges = EAGER.exchanges(expected, piece, grad, case.size)
    assert torch.equal(masked, expected)
    assert torch.equal(again, expected)
    assert of_exchanges.isfinite().all()
    scale = float(of_exchanges.abs().max())
    wanted = (of_exchanges / scale).to(changes.dtype)
    torch.testing.assert_close(changes / scale, wanted, rtol=0, atol=4e-6)


PRODUCTS = {"fp32": "bf16", "bf16": "bf16", "fp16": "fp16"}  # formats by that of the weights
SHAPES = [("bf16", 16, 0, False, 90)]
SHAPES += [("fp32", 4, 0, False, architecture) for architecture in ARCHITECTURES]
MORE = [("fp16", 4, 0, False), ("bf16", 4, 2, False), ("bf16", 4, 0, True), ("bf16", 8, 0, False)]
MORE += [("bf16", 4, 0, False), ("bf16", 16, 0, False)]
SHAPES += [
    pytest.param(*shape, architecture, marks=pytest.mark.slow)
    for shape in MORE
    for architecture in ARCHITECTURES
    if (*shape, architecture) not in SHAPES
]


@pytest.mark.parametrize(("weights", "m", "terms", "dense", "architecture"), SHAPES)
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")
def test_gpus_keep_a_tile_in_registers(
    weights: str, m: int, terms: int, dense: bool, architecture: int
) -> None:
    """Widths are divisible by 16, as in all known models, which is what the code depends on."""
    module = importlib.import_module("permllm.training.triton_kernels")
    names = ("weight", "source", "column", "row", "grad", "limits", "stay", "out", "changes")
    types = dict.fromkeys(names, "*fp32") | {"weight": f"*{weights}", "source": "*i64"}
    types |= dict.fromkeys(("out", "grad"), f"*{PRODUCTS[weights]}")
    types |= dict.fromkeys(("rows", "channels", "size", "groups"), "i32:16") | {"share": "fp32"}
    kind: dict[str, Any] = {"GATHER": True, "POWER": int(not dense), "TERMS": terms, "DENSE": dense}
    masks = kind | {"N": m // 2, "M": m, "LANES": m, "ROWS": module._rows_of(m)}
    for limits in (False, True):
        constants = masks | {"THRESHOLDS": limits}
        assert spilled_bytes(module._mask, types, constants, architecture, 1) <= 64
    tile = {"CHANNELS": module._CHANNELS, "GROUPS": module._GROUPS, "ROWS": module._ROWS}
    assert spilled_bytes(module._exchange, types, kind | tile, architecture, module._WARPS) <= 64
