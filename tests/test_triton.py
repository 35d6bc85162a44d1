"""Triton kernels without a GPU: right in Triton's interpreter, and compiled without spills."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from permllm.sparsity.saliency import SaliencyFactors
from permllm.training.elementwise import ChannelChunk
from permllm.training.kernels import EAGER
from tests.conftest import ROOT

slow = pytest.mark.slow
triton = pytest.importorskip("triton", reason="no Triton on this platform")

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


def spilled_bytes(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], architecture: int, warps: int
) -> int:
    """Compile a kernel; return the bytes of a thread's state that have no place in registers.

    Args:
        kernel: a Triton function.
        types: of the arguments that are not constants, such as `*bf16`; `i32:16` is divisible by
            16, as every pointer is.
        constants: by argument.
        architecture: compute capability, as in 90.
        warps: of a program.
    """
    compiler = importlib.import_module("triton.compiler")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", architecture, 32)
    names = kernel.arg_names
    kinds = {name: kind.partition(":") for name, kind in types.items() if name in names}
    signature = {name: kinds[name][0] if name in kinds else "constexpr" for name in names}
    divisible = [name for name, (kind, _, by) in kinds.items() if kind[0] == "*" or by == "16"]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = compiler.ASTSource(kernel, signature, constants, attributes)
    made = triton.compile(source, target=target, options={"num_warps": warps})
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = re.search(r"STACK:(\d+)", said)
    assert used is not None, said
    return int(used.group(1))


A100, H100, B200 = 80, 90, 100
PRODUCTS = {"fp32": "bf16", "bf16": "bf16", "fp16": "fp16"}  # formats by that of the weights
FORMS = [("fp32", 4, 0, False), ("fp16", 4, 0, False), ("bf16", 4, 2, False), ("bf16", 4, 0, True)]
FORMS += [("bf16", m, 0, False) for m in (4, 8, 16)]
SHAPES = [(*form, architecture) for form in FORMS for architecture in (A100, H100, B200)]
QUICK = [("bf16", 16, 0, False, H100), ("fp32", 4, 0, False, H100)]
no_fusion = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")


def mostly_slow(shapes: list[Any], quick: list[Any]) -> list[Any]:
    return [shape if shape in quick else pytest.param(*shape, marks=slow) for shape in shapes]


@pytest.mark.parametrize(
    ("weights", "m", "terms", "dense", "architecture"), mostly_slow(SHAPES, QUICK)
)
@no_fusion
def test_gpus_keep_a_tile_in_registers(
    weights: str, m: int, terms: int, dense: bool, architecture: int
) -> None:
    """Widths are divisible by 16, as in all known models, which is what the code depends on."""
    module = importlib.import_module("permllm.training.triton_kernels")
    names = ("weight", "source", "column", "row", "grad", "thresholds", "stay", "out", "changes")
    types = dict.fromkeys(names, "*fp32") | {"weight": f"*{weights}", "source": "*i64"}
    types |= dict.fromkeys(("out", "grad"), f"*{PRODUCTS[weights]}")
    types |= dict.fromkeys(("rows", "channels", "size", "groups"), "i32:16") | {"share": "fp32"}
    kind: dict[str, Any] = {"GATHER": True, "POWER": int(not dense), "TERMS": terms, "DENSE": dense}
    masks = kind | {"N": m // 2, "M": m, "LANES": m, "ROWS": module._rows_of(m)}
    for thresholds in (False, True):
        constants = masks | {"THRESHOLDS": thresholds}
        assert spilled_bytes(module._mask, types, constants, architecture, 1) <= 64
    tile = {"CHANNELS": module._CHANNELS, "GROUPS": module._GROUPS, "ROWS": module._ROWS}
    assert spilled_bytes(module._swap, types, kind | tile, architecture, module._WARPS) <= 64


BLOCKS = [(64, A100), (64, H100), (64, B200), (16, H100), (1024, H100)]


@pytest.mark.parametrize(("size", "architecture"), mostly_slow(BLOCKS, [(64, H100)]))
@no_fusion
def test_gpus_keep_the_state_of_a_block_in_registers(size: int, architecture: int) -> None:
    kernel = importlib.import_module("permllm.permutation.lcp.assignment_triton")._assign
    types = {"soft": "*fp32", "permutations": "*i64", "size": "i32:16"}
    warps = max(1, min(8, size // 64))
    assert spilled_bytes(kernel, types, {"LANES": size}, architecture, warps) <= 64
