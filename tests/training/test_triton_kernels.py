"""The kernels of a GPU: in Triton's interpreter the eager functions, whatever the numbers; compiled without spills."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from permllm.training.elementwise import Piece
from permllm.training.kernels import EAGER
from tests.conftest import ROOT
from tests.triton_code import ARCHITECTURES, spilled_bytes

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


NUMBERS = ("random", "tied", "huge", "denormal")
CASES = [
    Case(numbers, dtype)
    for numbers in NUMBERS
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
# Triton decides when it is imported whether it interprets: an interpreter of its own.
CHILD = """
import sys, torch
from permllm.training.elementwise import Piece
from permllm.training.triton_kernels import exchanges, mask
found = []
for piece, grad, n, m, size in torch.load(sys.argv[1]):
    masked, again = torch.zeros_like(grad), torch.zeros_like(grad)
    mask(masked, Piece(*piece), n, m)
    found.append((masked, again, exchanges(again, Piece(*piece), grad, n, m, size)))
torch.save(found, sys.argv[2])
"""


def given(case: Case) -> tuple[Piece, Tensor]:
    """Two blocks of a weight that has more channels, and the gradient of the weight."""
    generator = torch.Generator().manual_seed(case.m * case.size + case.rows)
    channels, rows = 2 * case.size, case.rows
    weight = torch.randn(channels + case.m, rows, generator=generator)
    weight = {
        "random": weight,
        "tied": weight.round().clamp(-1, 1),
        "huge": weight.clamp(-3, 3) * 2.0 ** (13 if case.dtype == torch.float16 else 120),
        "denormal": weight * 2.0 ** (-20 if case.dtype == torch.float16 else -120),
    }[case.numbers].to(case.dtype)
    grad = torch.randn(weight.shape, generator=generator).to(case.dtype)
    chosen = (
        None
        if case.form == "dense"
        else torch.randperm(len(weight), generator=generator)[:channels]
    )
    factors = torch.randint(1, 3, (2, rows), generator=generator).float()
    row = factors if case.form == "two terms" else None
    terms = {"vector": 1, "two terms": 2, "dense": rows}[case.form]
    column = torch.randint(1, 4, (channels, terms), generator=generator).float().t()
    if (
        case.numbers == "denormal"
    ):  # saliencies are; the interpreter has no bfloat16 weights that are
        column = column * 2.0**-10
    return Piece(
        weight if chosen is not None else weight[:channels], chosen, case.power, column, row
    ), grad


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return two results of the kernel for masks, the second made with the exchanges, and the exchanges, for each case."""
    folder = tmp_path_factory.mktemp("kernels")
    asked = []
    for case in CASES:
        piece, grad = given(case)
        asked.append((tuple(piece), grad[: len(piece.weight_t)], case.n, case.m, case.size))
    torch.save(asked, folder / "asked.pt")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CHILD, str(folder / "asked.pt"), str(folder / "found.pt")]
    subprocess.run(command, env=environment, check=True, timeout=300)
    made: list[tuple[Tensor, Tensor, Tensor]] = torch.load(folder / "found.pt")
    return made


@pytest.mark.parametrize("case", CASES, ids=str)
def test_they_are_the_eager_functions(
    found: list[tuple[Tensor, Tensor, Tensor]], case: Case
) -> None:
    masked, again, changes = found[CASES.index(case)]
    piece, grad = given(case)
    grad = grad[: len(piece.weight_t)]
    expected = torch.zeros_like(grad)
    of_exchanges = EAGER.exchanges(expected, piece, grad, case.n, case.m, case.size)
    assert torch.equal(masked, expected)
    assert torch.equal(again, expected)
    assert of_exchanges.isfinite().all()
    scale = float(of_exchanges.abs().max())
    torch.testing.assert_close(
        changes / scale, (of_exchanges / scale).to(changes.dtype), rtol=0, atol=4e-6
    )


MODELS = {"LLaMA-2-7B": (4096, 11008), "Qwen2.5-7B": (3584, 18944), "Llama-3.1-8B": (4096, 14336)}
WEIGHTS = {"fp32": "bf16", "bf16": "bf16", "fp16": "fp16"}  # and the products with them


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("weights", "m", "terms", "dense"),
    [(weights, 4, 0, False) for weights in WEIGHTS]
    + [("bf16", 4, 2, False), ("bf16", 4, 0, True), ("bf16", 8, 0, False), ("bf16", 16, 0, False)],
)
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")
def test_gpus_keep_a_tile_in_registers(
    architecture: int, weights: str, m: int, terms: int, dense: bool
) -> None:
    """All widths of the models are divisible by 16, which is what the code depends on."""
    assert all(width % 16 == 0 for sizes in MODELS.values() for width in sizes)
    module = importlib.import_module("permllm.training.triton_kernels")
    pointers = {
        "weight": weights,
        "out": WEIGHTS[weights],
        "grad": WEIGHTS[weights],
        "source": "i64",
    }
    names = ("weight", "source", "column", "row", "grad", "limits", "stay", "out", "changes")
    types = {name: f"*{pointers.get(name, 'fp32')}" for name in names}
    types |= dict.fromkeys(("rows", "channels", "size", "groups"), "i32:16") | {"share": "fp32"}
    kind: dict[str, Any] = {
        "GATHER": True,
        "POWER": 0 if dense else 1,
        "TERMS": terms,
        "DENSE": dense,
    }
    tile = {"N": m // 2, "M": m, "LANES": m, "ROWS": module._rows_of(m)}
    for limits in (False, True):
        assert (
            spilled_bytes(
                module._mask, types, kind | tile | {"THRESHOLDS": limits}, architecture, 1
            )
            <= 64
        )
    tile = {"CHANNELS": module._CHANNELS, "GROUPS": module._GROUPS, "ROWS": module._ROWS}
    assert spilled_bytes(module._exchange, types, kind | tile, architecture, module._WARPS) <= 64
